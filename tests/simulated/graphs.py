"""ONNX graphs on ONNX Runtime, as engines would run them. bf16, for which it has no kernels, is computed in an fp32 copy."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

TYPES: dict[int, tuple[str, Any]] = {  # as TensorRT calls them, and as their bytes are read
    TensorProto.FLOAT: ("FLOAT", np.float32),
    TensorProto.FLOAT16: ("HALF", np.float16),
    TensorProto.BFLOAT16: ("BF16", ml_dtypes.bfloat16),
    TensorProto.INT64: ("INT64", np.int64),
}


class Graph:
    """One graph, ready to run."""

    def __init__(self, path: Path):
        model = onnx.load(path)
        self.inputs = {value.name: described(value) for value in model.graph.input}
        self.outputs = {value.name: described(value) for value in model.graph.output}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        if holds_bfloat16(model):
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
            self._session = onnxruntime.InferenceSession(widened(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
        else:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._wide = {value.name for value in self._session.get_inputs() if value.type == "tensor(float)"}

    def run(self, feeds: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Outputs in the graph's own types."""
        given = {name: array.astype(np.float32) if name in self._wide else array for name, array in feeds.items()}
        found = self._session.run(list(self.outputs), given)
        return {name: array.astype(kind) for (name, (_, kind, _)), array in zip(self.outputs.items(), found, strict=True)}


@functools.cache
def graph(path: Path) -> Graph:
    """Graphs are loaded once for all machines."""
    return Graph(path)


def described(value: onnx.ValueInfoProto) -> tuple[str, Any, tuple[int, ...]]:
    """TensorRT's type name, numpy's dtype, and the shape with −1 for free dimensions."""
    tensor = value.type.tensor_type
    return *TYPES[tensor.elem_type], tuple(d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim)


def holds_bfloat16(model: onnx.ModelProto) -> bool:
    """Whether a graph computes in bf16."""
    return any(tensor.data_type == TensorProto.BFLOAT16 for tensor in model.graph.initializer) or any(
        attribute.i == TensorProto.BFLOAT16 for node in model.graph.node if node.op_type == "Cast" for attribute in node.attribute
    )


def widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph in fp32 wherever it is in bf16: the same weights, without the rounding between operators."""
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
            elif attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == TensorProto.BFLOAT16:
                attribute.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(attribute.t).astype(np.float32)))
            elif attribute.name in ("output_dtype", "dtype") and attribute.i == TensorProto.BFLOAT16:
                node.attribute.remove(attribute)
                node.attribute.append(helper.make_attribute(attribute.name, TensorProto.FLOAT))
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    return model
