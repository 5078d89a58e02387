"""Run a graph of the `tensorrt` dialect on ONNX Runtime as its runtime does: buffers of fixed capacity, whatever keys lie beyond are masked."""

from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime

from fr_export.emulate import in_fp32

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class InPlace:
    """One model and its caches. A bf16 graph, for which there are no kernels, runs as a copy in fp32 that rounds where the graph does."""

    def __init__(self, file: Path):
        model = ir.load(file)
        if ir.DataType.BFLOAT16 in {value.dtype for value in model.graph.inputs}:
            file = file.with_suffix(".emulated.onnx")
            ir.save(in_fp32(model), file)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        # further up, 1.32 crashes on fp16 graphs and replaces products of int8 weights by ones that round activations too
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        past = [value for name, value in self.inputs.items() if name.startswith("past.")]
        self.capacity = int(past[0].shape[2])
        self.caches = {value.name: np.zeros(value.shape, TYPES[value.type]) for value in past}
        self.length = 0

    def forward(self, ids: Sequence[int], wanted: Sequence[int] | None = None, keys: int | None = None) -> list[np.ndarray]:
        """Append ids; logits [K, V] (and routing [K, n]) of the `wanted` positions, of all where None. `keys` positions are read."""
        end = self.length + len(ids)
        feeds = self.caches | {
            "input_ids": np.array([ids], np.int64),
            "write_index": np.array([self.length], np.int64),
            "key_positions": np.arange(end if keys is None else keys),
            "logit_positions": np.arange(len(ids)) if wanted is None else np.array(wanted, np.int64),
        }
        found = dict(zip(self.outputs, self.session.run(None, feeds), strict=True))
        self.caches = {name: found[name.replace("past.", "present.")] for name in self.caches}
        self.length = end
        return [found[name][0] for name in ("logits", "routing") if name in found]

    def read(self, ids: Sequence[int], chunk: int, spare: int = 0) -> list[np.ndarray]:
        """Every position's answer from an empty cache, in chunks, with up to `spare` keys more than needed."""
        self.length = 0
        parts = []
        for start in range(0, len(ids), chunk):
            piece = ids[start : start + chunk]
            parts.append(self.forward(piece, keys=min(self.capacity, start + len(piece) + spare)))
        return [np.concatenate(kind) for kind in zip(*parts, strict=True)]


def half_of(bf16: np.ndarray) -> np.ndarray:
    """What bf16 makes of fp32 values."""
    return np.asarray(bf16.astype(ml_dtypes.bfloat16).astype(np.float32))
