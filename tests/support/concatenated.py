"""Graphs of the `portable` dialect run as Optimum runs them: caches that grow, a mask over all tokens, positions counted from it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime


def positions(mask: np.ndarray) -> np.ndarray:
    """int64 [B, T] of a mask [B, T] with padding on the left; transformers gives padding the position 1."""
    found: np.ndarray = np.where(mask == 0, 1, mask.cumsum(-1) - 1)
    return found


class Reader:
    """One graph, at every level of ONNX Runtime's optimisations that people use: all of them."""

    def __init__(self, file: Path):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self.inputs, self.outputs = (
            [(v.name, v.type, v.shape) for v in ends] for ends in (self.session.get_inputs(), self.session.get_outputs())
        )

    def read(self, ids: np.ndarray, mask: np.ndarray, chunks: Sequence[int], empty: tuple[int, int] = (1, 1)) -> np.ndarray:
        """Logits float32 [B, S, V] of ids and mask [B, S], read in chunks; `empty` is the shape of the heads of empty caches."""
        assert sum(chunks) == ids.shape[1]
        types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        past = {
            name: np.zeros((len(ids), empty[0], 0, empty[1]), types[kind])
            for name, kind, _ in self.inputs
            if name.startswith("past_key_values.")
        }
        where, parts, start = positions(mask), [], 0
        for end in np.cumsum(chunks):
            now = slice(start, end)
            feeds = {"input_ids": ids[:, now], "attention_mask": mask[:, :end], "position_ids": where[:, now]} | past
            found = dict(zip([name for name, *_ in self.outputs], self.session.run(None, feeds), strict=True))
            past = {name: found[name.replace("past_key_values", "present")] for name in past}
            parts.append(found["logits"])
            start = end
        return np.concatenate(parts, 1)
