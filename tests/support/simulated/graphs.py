"""ONNX graphs on ONNX Runtime, as engines would run them.

bf16, for which it has no kernels, is computed in an fp32 copy that rounds where the graph does.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto

from fusionroute.fr_export.verify.half_on_cpu import in_fp32

TYPES: dict[int, tuple[str, Any]] = {  # as TensorRT calls them, and as their bytes are read
    TensorProto.FLOAT: ("FLOAT", np.float32),
    TensorProto.FLOAT16: ("HALF", np.float16),
    TensorProto.BFLOAT16: ("BF16", ml_dtypes.bfloat16),
    TensorProto.INT64: ("INT64", np.int64),
}


class Graph:
    """One graph, ready to run."""

    def __init__(self, path: Path):
        model = onnx.load(path, load_external_data=False)
        self.inputs = {value.name: described(value) for value in model.graph.input}
        self.outputs = {value.name: described(value) for value in model.graph.output}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        # further up, 1.32 crashes on fp16 graphs and replaces products of int8 weights by ones that round activations
        # too
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        if any(kind is ml_dtypes.bfloat16 for _, kind, _ in self.inputs.values()):
            inner = ir.load(path)
            path = path.with_suffix(".emulated.onnx")
            ir.save(in_fp32(inner), path)
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._wide = {value.name for value in self._session.get_inputs() if value.type == "tensor(float)"}

    def run(self, feeds: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Outputs in the graph's own types."""
        given = {name: array.astype(np.float32) if name in self._wide else array for name, array in feeds.items()}
        outputs = self._session.run(list(self.outputs), given)
        return {name: array.astype(kind) for (name, (_, kind, _)), array in zip(self.outputs.items(), outputs, strict=True)}


@functools.cache
def graph(path: Path) -> Graph:
    """Graphs are loaded once for all machines."""
    return Graph(path)


def described(value: onnx.ValueInfoProto) -> tuple[str, Any, tuple[int, ...]]:
    """TensorRT's type name, numpy's dtype, and the shape with −1 for free dimensions."""
    tensor = value.type.tensor_type
    return *TYPES[tensor.elem_type], tuple(d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim)
