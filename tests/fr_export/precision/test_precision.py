"""Quantisers against plain arithmetic, and the weight store: every tensor once, in every precision."""

import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import load_file, save_file

from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.precision import SCHEMES, collect, int4
from fusionroute.fr_export.precision.blockwise import SMALLEST_NORMAL, blocked, nearest
from fusionroute.fr_export.precision.half import Half
from fusionroute.fr_export.precision.int8 import BLOCK, SMALL, quantise
from fusionroute.fr_export.precision.qdq.fp8 import Fp8
from fusionroute.fr_export.precision.w8a8 import StaticW8A8
from fusionroute.fr_export.verify.torch_reference import reference
from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.errors import FusionError, InputError
from fusionroute.runtime.precisions import PRECISIONS, exported_for
from tests.support.exporting import ALL, export_checkpoints, export_system
from tests.support.stored_weights import StoredWeight, stored_weights
from tests.support.systems import Shape, make_system

MATRICES = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 6), st.integers(1, 200)), elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
)


@settings(deadline=None, derandomize=True)
@given(MATRICES)
def test_int8_is_round_to_nearest_in_blocks_of_64(weights: np.ndarray) -> None:
    values, scales, zeros = quantise(weights)
    assert zeros is None
    rows, width = weights.shape
    for row in range(rows):
        for block in range(-(-width // BLOCK)):
            exact = weights[row, block * BLOCK : (block + 1) * BLOCK].astype(np.float64)
            stored = values[row, block, : len(exact)].astype(np.float64) - 128
            scale = float(scales[row, block])
            assert scale == pytest.approx(np.abs(exact).max() / 127, rel=1e-6, abs=SMALLEST_NORMAL)
            assert np.abs(stored).max() <= 127
            assert np.abs(stored * scale - exact).max() <= scale * 0.5001 + 127 * SMALLEST_NORMAL
            assert (values[row, block, len(exact) :] == 128).all()


@settings(deadline=None, derandomize=True)
@given(MATRICES)
def test_int4_rounds_within_its_range_and_not_worse_than_the_whole_range(weights: np.ndarray) -> None:
    values, scales, zeros = int4.quantise(weights)
    assert zeros is not None and scales.dtype == np.float16 and values.max() <= 15 and zeros.max() <= 15
    exact = blocked(weights, int4.BLOCK).astype(np.float64)
    step = scales.astype(np.float64)[..., None]
    widened = (values.astype(np.float64) - zeros[..., None]) * step
    padding = slice(weights.shape[1] - (exact.shape[1] - 1) * int4.BLOCK, None)
    assert (widened[:, -1, padding] == 0).all()
    low, high = np.minimum(exact.min(-1), 0)[..., None], np.maximum(exact.max(-1), 0)[..., None]
    whole = ((high - low) / 15).astype(np.float16).astype(np.float64)  # no clipping, no search
    with np.errstate(divide="ignore", invalid="ignore"):
        zero = np.nan_to_num(np.rint(-low / whole))
        plain = np.nan_to_num(np.clip(np.rint(exact / whole) + zero, 0, 15) - zero) * whole
    assert (np.square(widened - exact).sum(-1) <= np.square(plain - exact).sum(-1) * 1.001 + 1e-9).all()


def test_int4_graphs_compute_with_the_rounded_weights(tmp_path: Path) -> None:
    """Against torch whose matrices were rounded; the products also round their activations to 8 bits."""
    # blocks that are not full
    shape = Shape(experts=1, layers=2, hidden=80, head_dim=20, config={"tie_word_embeddings": True})
    router, experts = make_system(tmp_path / "system", shape)
    bundle = export_checkpoints(tmp_path / "bundle", shape, router, experts, ("int4",))
    for folder in (router, *experts.values()):
        file = Path(folder) / "model.safetensors"
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if tensor.ndim == 2:
                # three blocks of 32, an odd number, which the oldest supported ONNX Runtime looks up at 8 bits only
                values, scales, zeros = nearest(tensor.numpy(), SMALL) if "embed" in name else int4.quantise(tensor.numpy())
                middle = 128.0 if zeros is None else zeros[..., None].astype(np.float32)
                rounded = (values.astype(np.float32) - middle) * scales.astype(np.float32)[..., None]
                tensors[name] = torch.from_numpy(rounded.reshape(len(tensor), -1)[:, : tensor.shape[1]].copy())
        save_file(tensors, file, {"format": "pt"})
    ids = [5, 9, 200, 31, 7, 7, 120, 3]
    (expected,) = reference(System.open(FAMILIES["llama3"], router, experts), [ids], (0.5, 0.5))
    with FusionRuntime.load(bundle, "int4") as runtime:
        for chunk in (8, 1):
            logits = runtime.score(ids, chunk=chunk).logits
            assert np.abs(logits - expected.logits).mean() < 0.03 * expected.logits.std()


def test_int4_refuses_weights_beyond_its_range(tmp_path: Path) -> None:
    router, experts = make_system(tmp_path, Shape(experts=1))
    file = Path(router) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 3e6
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"router.* cannot be exported as int4: The weight '.*up_proj.weight' holds values beyond"):
        export_checkpoints(tmp_path / "bundle", Shape(experts=1), router, experts, ("int4",))


def locations(bundle: Path, precision: str) -> dict[str, dict[str, StoredWeight]]:
    """Model → initialiser → where it lies, read from the exported graphs."""
    graphs = sorted((bundle / "graphs").glob(f"*.{precision}.onnx"))
    return {path.name.split(".")[0]: stored_weights(path) for path in graphs}


@pytest.mark.parametrize("family", ["llama3", "gemma2"])
def test_tied_embedding_and_head_stand_once_in_every_precision(family: str, tmp_path: Path) -> None:
    shape = Shape(family, config={"tie_word_embeddings": True}, vocab=400, hidden=64, experts=1)
    bundle, _ = export_system(tmp_path, shape, ALL)
    for precision in ALL:
        weights = locations(bundle, precision)["router"]
        matrix = shape.vocab * shape.hidden
        expected = {
            "fp32": [4 * matrix],
            "fp16": [2 * matrix],
            "bf16": [2 * matrix],
            "int8": [matrix, 4 * matrix // BLOCK],
            "int4": [matrix // 2, matrix // 16, matrix // 64],
        }[precision]
        for size in expected:
            places = {place for place in weights.values() if place.length == size}
            assert len(places) == 1, (precision, places)
    for precision, operands in (("int8", 2), ("int4", 3)):
        graph = ir.load(bundle / f"graphs/router.ort-cpu.{precision}.onnx").graph
        lookup = next(n for n in graph if n.op_type == "GatherBlockQuantized")
        product = next(n for n in graph if n.op_type == "MatMulNBits" and n.attributes["N"].as_int() == shape.vocab)
        blocks = {n.attributes["block_size"].as_int() for n in graph if n.op_type == "MatMulNBits" and n is not product}
        assert lookup.attributes["block_size"].as_int() == product.attributes["block_size"].as_int() == (64 if precision == "int8" else 32)
        assert blocks == {64}
        for place in range(operands):
            mine, other = lookup.inputs[place + (place > 0)], product.inputs[1 + place]
            assert mine is not None and other is not None
            assert weights_of(mine) == weights_of(other)


def weights_of(value: ir.Value) -> tuple[str, int | None]:
    if value.producer() is not None:  # scales are widened
        return weights_of(value.producer().inputs[0])
    assert isinstance(value.const_value, ir.ExternalTensor)
    return str(value.const_value.location), value.const_value.offset


def test_a_frozen_embedding_costs_nothing_extra(tmp_path: Path) -> None:
    """An expert with the router's embedding adds only the rest of its weights; an equal one adds none."""
    shape = Shape(vocab=400, experts=2, config={"tie_word_embeddings": True})
    router, experts = make_system(tmp_path, shape)
    separate = weight_bytes(export_checkpoints(tmp_path / "separate", shape, router, experts))
    first, second = (Path(folder) for folder in experts.values())
    tensors = load_file(first / "model.safetensors")
    embedding = "model.embed_tokens.weight"
    save_file(
        tensors | {embedding: load_file(Path(router) / "model.safetensors")[embedding]}, first / "model.safetensors", {"format": "pt"}
    )
    frozen = weight_bytes(export_checkpoints(tmp_path / "frozen", shape, router, experts))
    shutil.copyfile(first / "model.safetensors", second / "model.safetensors")
    twins = weight_bytes(export_checkpoints(tmp_path / "twins", shape, router, experts))
    matrix = shape.vocab * shape.hidden
    for precision, size in (
        ("fp32", 4 * matrix),
        ("fp16", 2 * matrix),
        ("bf16", 2 * matrix),
        ("int8", matrix + 4 * matrix // BLOCK),
        ("int4", matrix // 2 + matrix // 16 + matrix // 64),
    ):
        assert separate[precision] - frozen[precision] == size
        assert twins[precision] <= frozen[precision] - (separate[precision] - size) / 5


def weight_bytes(bundle: Path) -> dict[str, int]:
    """Precision → bytes of the distinct weights that its graphs read."""
    return {precision: sum(place.length for place in places(bundle, precision)) for precision in ALL}


def places(bundle: Path, precision: str) -> set[StoredWeight]:
    """The distinct weights that the graphs of a precision read."""
    return {place for model in locations(bundle, precision).values() for place in model.values()}


def test_a_half_precision_checkpoint_loses_nothing_in_its_own_precision(tmp_path: Path) -> None:
    for precision, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        bundle, _ = export_system(tmp_path / precision, Shape("gemma2", experts=2, dtype=dtype), ("fp32", precision))
        logits = []
        for which in ("fp32", precision):
            with FusionRuntime.load(bundle, which) as runtime:
                logits.append(runtime.score([5, 9, 200, 31, 7, 7, 120]).logits)
        assert np.array_equal(logits[0], logits[1]), precision


def test_bf16_rounds_as_torch_does(tmp_path: Path) -> None:
    bundle, system = export_system(tmp_path, Shape(experts=1, layers=1), ("bf16",))
    name = "model.layers.0.mlp.up_proj.weight"
    stored = locations(bundle, "bf16")["router"][f"model.{name}"]
    expected = torch.from_numpy(system.router.weights.read(name)).bfloat16()
    assert stored.read() == expected.view(torch.int16).numpy().tobytes()


def test_fp16_refuses_weights_beyond_its_range(tmp_path: Path) -> None:
    from fusionroute.fr_export.graphs.graph import Graph
    from fusionroute.fr_export.graphs.weight_store import Store

    matrix = ir.Value(name="w", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 2]))
    graph = Graph(ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 20}), ir_version=10), {}, 1, (1, 8))
    with pytest.raises(InputError, match=r"'w' holds values beyond fp16's 65,504.*export it as fp32 or int8"):
        SCHEMES["ort:cpu"]["fp16"].bind(graph, matrix, iter([np.array([[1.0, 7e4]], np.float32)]), Store(tmp_path))
    assert list((tmp_path / "weights").iterdir()) == []


def test_schemes_are_collected_from_their_files_in_the_order_of_the_records() -> None:
    assert {target: list(schemes) for target, schemes in SCHEMES.items()} == {
        "ort:cpu": ["fp32", "fp16", "bf16", "int8", "int4", "w8a8"],
        "ort:cuda": ["fp16", "bf16"],
        "portable": ["fp32", "fp16", "int8"],
        "tensorrt": ["fp32", "fp16", "bf16", "int8", "fp8", "int8-wo", "int4", "nvfp4"],
        "tensorrt:10.3": ["fp32", "fp16", "bf16", "int8", "int8-wo"],
    }


def test_the_records_name_the_targets_that_have_a_scheme() -> None:
    """The command line refuses by the records, before torch is loaded."""
    assert {target: tuple(schemes) for target, schemes in SCHEMES.items()} == {target: exported_for(target) for target in SCHEMES}
    assert {target for record in PRECISIONS.values() for target in record.targets} == SCHEMES.keys()
    with pytest.raises(FusionError, match=r"^mine has the precision 'fp16' for gpu, which its record does not name: .*precisions\.py\.$"):
        collect({"mine": {"gpu": (Half("fp16"),)}})


def test_the_records_name_the_targets_that_need_calibration() -> None:
    """Their schemes refuse to bind a matrix without it."""
    for target, schemes in SCHEMES.items():
        for name, scheme in schemes.items():
            refuses = type(scheme).bind in (StaticW8A8.bind, Fp8.bind)
            assert (target in PRECISIONS[name].calibrated_on) == refuses, (target, name)


def test_a_scheme_without_a_record_is_refused_on_import() -> None:
    """It ended in KeyError once everything was written."""
    with pytest.raises(FusionError, match=r"^The precision 'fp6' of mine has no record and so no bound: add one to .*precisions\.py\.$"):
        collect({"mine": {"ort:cpu": (Half("fp6"),)}})
