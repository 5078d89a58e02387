"""Graphs of the `portable` dialect, run as Optimum runs them: growing caches, a mask, positions from the mask."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime


def positions(mask: np.ndarray) -> np.ndarray:
    """Positions int64 [B, T] of a mask [B, T] with padding on the left; transformers gives padding the position 1."""
    return np.asarray(np.where(mask == 0, 1, mask.cumsum(-1) - 1))


class Reader:
    """One graph, with all optimisations of ONNX Runtime, which is its default."""

    def __init__(self, file: Path):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self.inputs, self.outputs = (
            [(value.name, value.type, value.shape) for value in values]
            for values in (self.session.get_inputs(), self.session.get_outputs())
        )

    def read(self, ids: np.ndarray, mask: np.ndarray, chunks: Sequence[int], empty: tuple[int, int] = (1, 1)) -> np.ndarray:
        """Logits float32 [B, S, V] of ids and mask [B, S], read in chunks; `empty`: heads and size of empty caches."""
        assert sum(chunks) == ids.shape[1]
        types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        past = {
            name: np.zeros((len(ids), empty[0], 0, empty[1]), types[kind])
            for name, kind, _ in self.inputs
            if name.startswith("past_key_values.")
        }
        position_ids, parts, start = positions(mask), [], 0
        for end in np.cumsum(chunks):
            now = slice(start, end)
            feeds = {"input_ids": ids[:, now], "attention_mask": mask[:, :end], "position_ids": position_ids[:, now]} | past
            outputs = dict(zip([name for name, *_ in self.outputs], self.session.run(None, feeds), strict=True))
            past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
            parts.append(outputs["logits"])
            start = end
        return np.concatenate(parts, 1)
