"""Products and look-ups of 8 bits by row in ONNX Runtime, against numpy."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusionroute.fr_export.graphs.graph import Graph, initializer, node
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision.row_int8 import RowInt8
from fusionroute.runtime import machine
from fusionroute.runtime.backends import ort

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


def value(name: str, dtype: ir.DataType, shape: tuple[int | str, ...]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def graph(out: int, width: int, products: int, lookup: bool) -> Graph:
    """Products of one value with a matrix [out, width], and a look-up of its rows."""
    x, ids = value("x", FLOAT, ("batch", "sequence", width)), value("ids", INT64, ("batch", "sequence"))
    results = [value(f"product.{number}", FLOAT, ("batch", "sequence", out)) for number in range(products)]
    rows = [value("row", FLOAT, ("batch", "sequence", width))] if lookup else []
    inner = ir.Graph([x, ids], [*results, *rows], nodes=[], opset_imports={"": 20, "com.microsoft": 1}, name="products")
    matrix = initializer(inner, "matrix", FLOAT, (out, width))
    for result in results:
        node(inner, None, "com.microsoft::FusedMatMul", [x, matrix], [result], transB=1)
    for row in rows:
        node(inner, None, "Gather", [matrix, ids], [row])
    return Graph(ir.Model(inner, ir_version=10), {}, 0, (0, 0))


def rounded(rows: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Rows [..., K] to multiples of their steps [..., 1]."""
    multiples: np.ndarray = np.rint(rows / np.where(steps > 0, steps, 1)) * steps
    return multiples


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 5)),
    out=st.integers(1, 70),
    width=st.integers(1, 200),
    products=st.integers(0, 2),
    lookup=st.booleans(),
    seed=st.integers(0, 99),
)
def test_each_row_is_rounded_alone(
    tmp_path: Path, shape: tuple[int, int], out: int, width: int, products: int, lookup: bool, seed: int
) -> None:
    if not products and not lookup:
        products = 1
    random = np.random.default_rng(seed)
    # rows of very different size: a scale in common would lose the small ones
    x = random.standard_normal((*shape, width)).astype(np.float32) * np.exp2(random.integers(-9, 9, (*shape, 1))).astype(np.float32)
    weights = random.standard_normal((out, width)).astype(np.float32) * np.exp2(random.integers(-9, 9, (out, 1))).astype(np.float32)
    x[0, 0] = 0
    ids = random.integers(0, out, shape)
    traced = graph(out, width, products, lookup)
    matrix = traced.model.graph.initializers["matrix"]
    RowInt8().bind(traced, matrix, iter(np.array_split(weights, 2)) if out > 1 else iter([weights]), Store(tmp_path))
    assert "matrix" not in traced.model.graph.initializers
    ir.save(traced.model, tmp_path / "products.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "products.onnx", providers=["CPUExecutionProvider"])
    results = dict(zip([output.name for output in session.get_outputs()], session.run(None, {"x": x, "ids": ids}), strict=True))
    # each step is a 127th of the row's largest value, computed as it is there: else values half-way fall to either side
    x = rounded(x, np.abs(x).max(-1, keepdims=True) * np.float32(1 / 127)).astype(np.float64)
    weights = rounded(weights, np.abs(weights).max(-1, keepdims=True) / np.float32(127)).astype(np.float64)
    expected, size = x @ weights.T, np.abs(x) @ np.abs(weights).T
    for number in range(products):
        assert (np.abs(results[f"product.{number}"] - expected) <= 1e-5 * size).all()
    if lookup:
        np.testing.assert_allclose(results["row"], weights[ids], rtol=1e-6)


def test_one_row_does_not_change_another(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    traced = graph(64, 96, 1, lookup=False)
    weights = random.standard_normal((64, 96)).astype(np.float32)
    RowInt8().bind(traced, traced.model.graph.initializers["matrix"], iter([weights]), Store(tmp_path))
    ir.save(traced.model, tmp_path / "products.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "products.onnx", providers=["CPUExecutionProvider"])
    x = random.standard_normal((30, 1, 96)).astype(np.float32)
    x[7] *= 1000
    (together,) = session.run(None, {"x": x, "ids": np.zeros((30, 1), np.int64)})
    for row in (0, 7, 29):
        (alone,) = session.run(None, {"x": x[row : row + 1], "ids": np.zeros((1, 1), np.int64)})
        assert np.array_equal(alone[0], together[row])
    assert together[0] == pytest.approx(x[0] @ weights.T, abs=0.05 * float(np.abs(x[0] @ weights.T).max()))


@pytest.mark.parametrize(
    ("flags", "exact"), [("avx2 avx512f avx512_vnni amx_int8", True), ("avx2 avx_vnni", True), ("avx2 avx512f", False)]
)
def test_sums_of_8_bits_never_overflow(flags: str, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime's default lets them, on processors with AVX2 and without VNNI; its slower kernels are exact there."""
    monkeypatch.setattr(machine, "processor", lambda: ["model name : a processor", f"flags : fpu {flags}"])
    options = ort.settings(onnxruntime, 1)
    assert exact or options.get_session_config_entry("session.x64quantprecision") == "1"
    if exact:
        with pytest.raises(RuntimeError):  # not set
            options.get_session_config_entry("session.x64quantprecision")
