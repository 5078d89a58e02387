"""Compute on a CPU what graphs in NVFP4 compute: ONNX Runtime has no kernels for E2M1 there.

Weights are widened once, in numpy. What quantises activations becomes arithmetic in fp32 that rounds alike: scales of
blocks to E4M3, values to E2M1, both to nearest and even.
"""

from itertools import count

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fusionroute.fr_export.graphs.graph import added, initializer

FLOAT, NARROW, STEPS = ir.DataType.FLOAT, ir.DataType.FLOAT4E2M1, ir.DataType.FLOAT8E4M3FN
QUANTISE = "TRT_FP4DynamicQuantize"
LARGEST = 6.0  # of E2M1
LEAST = float(np.finfo(np.float32).tiny)


def widen_fp4(model: ir.Model) -> ir.Model:
    """The same model, changed: nothing of it is in E2M1."""
    graph = model.graph
    for node in [each for each in graph if each.op_type == "DequantizeLinear" and each.inputs[0] is not None]:
        values = node.inputs[0]
        producer = values.producer()
        if producer is None and values.dtype == NARROW:
            widen_weights(graph, node)
        elif producer is not None and producer.op_type == QUANTISE and producer.outputs[0] is values:
            round_input(graph, node)
    RemoveUnusedNodesPass()(model)
    model.graph.opset_imports.pop("trt", None)
    return model


def widen_weights(graph: ir.Graph, node: ir.Node) -> None:
    """Let the users of a dequantised matrix read it in its own type."""
    values, scale = node.inputs[0], node.inputs[1]
    scaling = scale.producer()
    if scaling.op_type == "Cast":
        scaling = scaling.inputs[0].producer()
    steps, unit = (value.const_value.numpy().astype(np.float32) for value in scaling.inputs[:2])
    block = node.attributes["block_size"].as_int()
    wide = values.const_value.numpy().astype(np.float32) * np.repeat(steps * unit, block, axis=1)
    result = node.outputs[0]
    name, dtype = f"{values.name}.wide", result.dtype or FLOAT
    array = wide.astype(dtype.numpy())
    result.replace_all_uses_with(initializer(graph, name, dtype, array.shape, ir.tensor(array, dtype=dtype, name=name)))


def round_input(graph: ir.Graph, node: ir.Node) -> None:
    """Let the users of an activation that was quantised in blocks read it rounded."""
    quantise = node.inputs[0].producer()
    x, unit = quantise.inputs
    block, result, name = node.attributes["block_size"].as_int(), node.outputs[0], node.outputs[0].name

    names = (f"{name}.{number}" for number in count())

    def of(op: str, *inputs: ir.Value, dtype: ir.DataType = FLOAT, **attributes: int) -> ir.Value:
        return added(graph, node, op, list(inputs), next(names), dtype=dtype, **attributes)

    def constant(value: object, dtype: ir.DataType = FLOAT) -> ir.Value:
        array, label = np.array(value, dtype.numpy()), next(names)
        return initializer(graph, label, dtype, array.shape, ir.tensor(array, name=label))

    blocks = of("Reshape", of("Cast", x, to=int(FLOAT)), constant([0, 0, -1, block], ir.DataType.INT64))
    largest = of("ReduceMax", of("Abs", blocks), constant([-1], ir.DataType.INT64), keepdims=1)
    steps = of("Cast", of("Div", of("Div", largest, constant(LARGEST)), unit), to=int(STEPS), dtype=STEPS)
    scale = of("Mul", of("Cast", steps, to=int(FLOAT)), unit)
    scaled = of("Div", blocks, of("Max", scale, constant(LEAST)))
    size = of("Min", of("Abs", scaled), constant(LARGEST))
    two, four = (of("Less", size, constant(limit), dtype=ir.DataType.BOOL) for limit in (2.0, 4.0))
    step = of("Where", two, constant(0.5), of("Where", four, constant(1.0), constant(2.0)))
    rounded = of("Mul", of("Mul", of("Round", of("Div", size, step)), step), of("Sign", scaled))
    flat = of("Reshape", of("Mul", rounded, scale), of("Shape", x, dtype=ir.DataType.INT64))
    dtype = result.dtype or FLOAT
    result.replace_all_uses_with(of("Cast", flat, to=int(dtype), dtype=dtype))
