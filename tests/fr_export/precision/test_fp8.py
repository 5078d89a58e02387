"""fp8 and nvfp4 against plain arithmetic on the checkpoint, and what runs them on a CPU against numpy."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from safetensors.numpy import load_file

from fusionroute.fr_export.precision.qdq.fp8 import rounded_rows
from fusionroute.fr_export.precision.qdq.nvfp4 import rounded_blocks, tensor_scale
from fusionroute.fr_export.verify.fp4_on_cpu import widen_fp4
from tests.support.exporting import export_checkpoints
from tests.support.systems import Shape, make_system

E4M3, E2M1 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn
FLOAT, FP8, FP4 = TensorProto.FLOAT, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT4E2M1
MATRIX = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A bundle in both precisions, and one of the router's matrices."""
    folder = tmp_path_factory.mktemp("floats")
    shape = Shape(experts=1, tokenizer=True)
    router, experts = make_system(folder / "system", shape)
    bundle = export_checkpoints(
        folder / "bundle", shape, router, experts, ("fp8", "nvfp4"), 64, calibration="builtin", targets=("tensorrt",)
    )
    return bundle, load_file(Path(router) / "model.safetensors")[MATRIX]


def product_of(bundle: Path, precision: str) -> tuple[ir.Graph, ir.Node]:
    """The router's graph, and what dequantises the matrix in it."""
    graph = ir.load(bundle / f"graphs/router.tensorrt.{precision}.onnx").graph
    (dequantise,) = (
        node for node in graph
        if node.op_type == "DequantizeLinear" and "layers.1.mlp.down_proj" in str(node.inputs[0].name) and node.outputs[0].name.endswith(".wide")
    )  # fmt: skip
    return graph, dequantise


def test_fp8_rounds_rows_to_nearest_and_their_inputs_to_what_calibration_saw(system: tuple[Path, np.ndarray]) -> None:
    bundle, weight = system
    _, dequantise = product_of(bundle, "fp8")
    values, scale = (value.const_value for value in dequantise.inputs[:2])
    assert values.dtype == ir.DataType.FLOAT8E4M3FN and dequantise.attributes["axis"].as_int() == 0
    steps = scale.numpy().astype(np.float32)
    largest = np.abs(weight).max(-1)
    assert np.all(largest <= 448 * steps) and np.all(448 * steps < largest * (1 + 2**-6)), "a number of 8 significant bits"
    wide = values.numpy().astype(np.float32)
    every = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
    every = every[np.isfinite(every)]
    nearest = np.abs(weight[:8, :, None] / steps[:8, None, None] - every).min(-1)
    assert np.allclose(np.abs(weight[:8] / steps[:8, None] - wide[:8]), nearest, atol=1e-6)
    (turned,) = dequantise.outputs[0].consumers()
    (product,) = turned.outputs[0].consumers()
    entered = product.inputs[0].producer()
    assert entered.op_type == "DequantizeLinear" and entered.inputs[0].dtype == ir.DataType.FLOAT8E4M3FN
    assert float(entered.inputs[1].const_value.numpy()) > 0


def test_nvfp4_rounds_blocks_of_16_and_leaves_the_head_at_8_bits(system: tuple[Path, np.ndarray]) -> None:
    bundle, weight = system
    graph, dequantise = product_of(bundle, "nvfp4")
    values = dequantise.inputs[0].const_value
    cast = dequantise.inputs[1].producer()
    steps, unit = (value.const_value.numpy().astype(np.float32) for value in cast.inputs[0].producer().inputs)
    assert dequantise.attributes["block_size"].as_int() == 16 and steps.shape == (len(weight), weight.shape[1] // 16)
    assert float(unit) == np.float32(np.abs(weight).max() / np.float32(6 * 448))
    wide = values.numpy().astype(np.float32) * np.repeat(steps * unit, 16, axis=1)
    blocks = weight.reshape(len(weight), -1, 16)
    plain = (np.abs(blocks).max(-1) / 6 / unit).astype(E4M3).astype(np.float32) * unit
    to_largest = (blocks / plain[..., None]).astype(E2M1).astype(np.float32) * plain[..., None]
    error = np.square(wide - weight).reshape(blocks.shape).sum(-1)
    assert np.all(error <= np.square(to_largest - blocks).sum(-1) * (1 + 1e-5))
    heads = [
        str(value.name) for value in graph.initializers.values() if value.dtype == ir.DataType.FLOAT8E4M3FN and "embed" in str(value.name)
    ]
    assert heads and {each.domain for each in graph if each.op_type == "TRT_FP4DynamicQuantize"} == {"trt"}
    assert graph.opset_imports["trt"] == 1


ROWS = st.integers(1, 5).flatmap(lambda count: st.lists(st.floats(-1e4, 1e4, width=32), min_size=32 * count, max_size=32 * count))


@settings(deadline=None)
@given(ROWS)
def test_rounding_stays_within_a_step(values: list[float]) -> None:
    """Of the format, whatever the values are: zeros, and sizes far apart."""
    rows = np.array(values, np.float32).reshape(-1, 32)
    rounded, scales = rounded_rows(rows)
    wide = rounded.astype(np.float32) * scales[:, None]
    assert np.all(np.abs(wide - rows) <= np.maximum(np.abs(rows) / 16, scales[:, None] * 2**-10) * (1 + 1e-5))
    unit = tensor_scale(float(np.abs(rows).max()))
    fours, steps = rounded_blocks(rows, unit)
    size = np.repeat(steps.astype(np.float32) * unit, 16, axis=1)
    assert np.isfinite(size).all() and np.all(np.abs(fours.astype(np.float32) * size - rows) <= np.maximum(np.abs(rows), size) + 1e-30)


def test_arithmetic_stands_in_for_e2m1() -> None:
    """It rounds as numpy's own types do, zeros and ties among the inputs."""
    random = np.random.default_rng(0)
    weight, x = random.normal(size=(48, 64)).astype(np.float32), random.normal(size=(1, 5, 64)).astype(np.float32)
    x[0, 0, :16] = 0
    x[0, 1, :16] = [6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -5, -2.5, -0.25, 1e-9, 4, 3, 2, 1]
    unit, own = np.float32(0.002), np.float32(0.01)
    values, steps = rounded_blocks(weight, unit)
    codes = values.view(np.uint8)
    arrays = {
        "w": (FP4, [48, 64], ((codes[:, 1::2] << 4) | codes[:, 0::2]).tobytes()), "ws": (FP8, [48, 4], steps.tobytes()),
        "wu": (FLOAT, [], unit.tobytes()), "xu": (FLOAT, [], own.tobytes()),
    }  # fmt: skip
    nodes = [
        helper.make_node("DequantizeLinear", ["ws", "wu"], ["wss"]),
        helper.make_node("DequantizeLinear", ["w", "wss"], ["wide"], axis=1, block_size=16),
        helper.make_node("TRT_FP4DynamicQuantize", ["x", "xu"], ["xq", "xs"], domain="trt", axis=-1, block_size=16, scale_type=17),
        helper.make_node("DequantizeLinear", ["xs", "xu"], ["xss"]),
        helper.make_node("DequantizeLinear", ["xq", "xss"], ["xd"], axis=-1, block_size=16),
        helper.make_node("Transpose", ["wide"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["xd", "turned"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", FLOAT, [1, "S", 64])], [helper.make_tensor_value_info("y", FLOAT, [1, "S", 48])],
        [helper.make_tensor(name, dtype, shape, raw, raw=True) for name, (dtype, shape, raw) in arrays.items()],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("trt", 1)], ir_version=11)
    session = onnxruntime.InferenceSession(
        ir.to_proto(widen_fp4(ir.from_proto(proto))).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    blocks = x.reshape(-1, 16)
    size = (np.abs(blocks).max(-1) / np.float32(6) / own).astype(E4M3).astype(np.float32)[:, None] * own
    entered: Any = np.divide(blocks, size, out=np.zeros_like(blocks), where=size > 0).astype(E2M1).astype(np.float32) * size
    wide = values.astype(np.float32) * np.repeat(steps.astype(np.float32) * unit, 16, axis=1)
    expected = entered.reshape(x.shape) @ wide.T
    assert np.allclose(session.run(None, {"x": x})[0], expected, rtol=1e-5, atol=1e-5)
