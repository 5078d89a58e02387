"""Quantised graphs for TensorRT, run on ONNX Runtime, against plain torch that computes with the rounded values."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fusionroute.calibration.record import RecordedText
from fusionroute.calibration.serving_masks import Mask
from fusionroute.fr_export.bundle.targets import TARGETS
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.graphs.dialects import tensorrt
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.source_rows import rows
from fusionroute.fr_export.graphs.trace import trace
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision import SCHEMES
from fusionroute.fr_export.precision.bind_weights import bind
from fusionroute.fr_export.precision.evidence import Evidence
from fusionroute.fr_export.precision.fit_context import FitContext
from fusionroute.fr_export.precision.qdq.int8 import PlannedInt8
from fusionroute.fr_export.precision.qdq.weight_formats import SMALLEST, block_grid, row_grid, stepped
from fusionroute.fr_export.precision.scheme import Fitted, Fitting
from fusionroute.fr_export.precision.shared_matrices import SharedMatrices
from fusionroute.fr_export.verify.engine_graph_on_cpu import EngineGraphOnCpu
from fusionroute.fr_export.verify.torch_reference import load
from tests.support.calibration import observe, traced
from tests.support.sparing import sparing
from tests.support.systems import Shape, make_system

CAPACITY = 64
IDS = [int(i) for i in np.random.default_rng(0).integers(3, 300, 40)]
SHAPES = {
    # o_proj reads 80 channels
    "llama3, odd widths": Shape(experts=1, head_dim=20, layers=1, config={"intermediate_size": 96}),
    "gemma2": Shape("gemma2", experts=1, layers=1, hidden=128, config={"tie_word_embeddings": True}),
    "smollm3": Shape("smollm3", experts=1, hidden=128),
    "gemma3": Shape("gemma3", experts=1, hidden=128),
    "phi3": Shape("phi3", experts=1, hidden=128),
}
QUANTISED = ("int8", "int8-wo", "int4")


class QuantisedRouter(NamedTuple):
    """A router in every quantised precision, each calibrated on the same texts: precision → its graph and what its fit
    says.

    Beside each graph stands exact.onnx: the same weights with activations in fp32.
    """

    shape: Shape
    system: System
    written: dict[str, tuple[Path, dict[str, Any]]]
    fits: dict[str, tuple[Graph, Fitted]]
    logits: np.ndarray


@pytest.fixture(scope="module", params=sparing(SHAPES, ("smollm3", "gemma3", "phi3")))
def router(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> QuantisedRouter:
    folder, shape = tmp_path_factory.mktemp("quantised"), SHAPES[request.param]
    system = System.open(FAMILIES[shape.family], *make_system(folder / "system", shape), max_seq_len=CAPACITY)
    graph, weights = traced(system), system.router.weights
    draw = np.random.default_rng(2)
    texts = [RecordedText(draw.integers(3, 300, 60).astype(np.int32), np.zeros(60, np.int8)) for _ in range(8)]
    known = Evidence(texts, [Mask(60, np.arange(60))] * 8, observe(graph, weights, [text.ids.tolist() for text in texts]))
    target = TARGETS["tensorrt"]
    plain = trace(system.family, system.router.config, system.vocab_size, CAPACITY, tensorrt)
    written, fits = {}, {}
    for name in QUANTISED:
        scheme, store = SCHEMES["tensorrt"][name], Store(folder / name)
        assert isinstance(scheme, Fitting)
        fit, fitted = scheme.fit(FitContext(graph, weights, known, store, SharedMatrices(), lambda _: None))
        for file, activations in (("model.onnx", name), ("exact.onnx", "fp32")):
            own = plain.with_sources_of(fit).clone()
            target.prepare(own, activations, system.family)
            target.dialect.end_with(own, system.head)
            bind(own, weights, fitted, store, lambda _: None)
            ir.save(own.model, folder / name / file)
        fits[name] = (fit, fitted)
        written[name] = (folder / name / "model.onnx", fitted.about)
    with torch.no_grad():
        logits = load(system.router)(input_ids=torch.tensor([IDS]), use_cache=False).logits[0].numpy()
    return QuantisedRouter(shape, system, written, fits, logits)


def weights_of(graph: ir.Graph) -> dict[str, tuple[np.ndarray, np.ndarray, int]]:
    """The quantised matrices of a graph: values int8 [out, in], scales as they are stored, and the block."""
    matrices = {}
    for node in graph:
        if node.op_type != "DequantizeLinear" or node.inputs[0].const_value is None:
            continue
        values, scale = (value.const_value.numpy() for value in node.inputs[:2])
        block = node.attributes["block_size"].as_int() if "block_size" in node.attributes else values.shape[1]
        matrices[str(node.inputs[0].name).rpartition(".")[0]] = (values.astype(np.int8), scale.astype(np.float32), block)
    return matrices


def widened(values: np.ndarray, scale: np.ndarray, block: int) -> np.ndarray:
    """float32 [out, in]."""
    return np.asarray(values * np.repeat(scale.reshape(len(values), -1), block, axis=1), np.float32)


@pytest.mark.parametrize("precision", QUANTISED)
def test_a_graph_computes_what_torch_computes_with_the_rounded_values(router: QuantisedRouter, precision: str) -> None:
    """Norms may hold the scales that smoothing moved, so torch takes every weight from the graph; inputs are rounded
    where the graph does.
    """
    path, _ = router.written[precision]
    graph = ir.load(path.with_name("exact.onnx")).graph
    model = load(router.system.router)
    matrices = {name: widened(*stored) for name, stored in weights_of(graph).items()}
    vectors = {
        n: v.const_value.numpy().astype(np.float32) for n, v in graph.initializers.items() if v.const_value is not None and len(v.shape) < 2
    }
    steps = {
        str(n.inputs[1].name).removesuffix(".turned"): float(rounding.inputs[1].const_value.numpy().astype(np.float32))
        for n in graph
        if n.op_type == "MatMul" and (rounding := n.inputs[0].producer()) is not None and rounding.op_type == "DequantizeLinear"
    }
    assert bool(steps) == (precision == "int8")
    offset = router.system.family.norm_offset
    for name, module in model.named_modules():
        own = f"model.{name}.weight"
        if isinstance(module, torch.nn.Linear):
            name, part = own, slice(None)
            if own not in matrices and "self_attn" in own:  # packed with its neighbours
                name = re.sub("[qkv]_proj", "qkv_proj", own)
                kv, q = router.shape.kv_heads * router.shape.head_size, router.shape.heads * router.shape.head_size
                part = {"q": slice(0, q), "k": slice(q, q + kv), "v": slice(q + kv, q + 2 * kv)}[own[-len("q_proj.weight")]]
            module.weight = torch.nn.Parameter(torch.from_numpy(matrices[name][part].copy()))
            if (step := steps.get(name)) is not None:
                module.register_forward_pre_hook(lambda _, args, step=step: ((args[0] / step).round().clamp(-128, 127) * step,))
        elif type(module).__name__.endswith("RMSNorm"):
            module.weight = torch.nn.Parameter(torch.from_numpy(vectors[own] - np.float32(offset)))
        elif isinstance(module, torch.nn.Embedding):
            table = matrices["model.lm_head.weight" if own not in matrices else own]
            module.weight = torch.nn.Parameter(torch.from_numpy(table))
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0].numpy()
    lost = np.abs(expected - router.logits).mean()
    for chunk, spare in ((40, 0), (7, 3), (1, CAPACITY)):
        exact, shipped = (EngineGraphOnCpu(file).read(IDS, chunk, spare)[0] for file in (path.with_name("exact.onnx"), path))
        gap = np.abs(exact - expected)
        if precision == "int8":  # a value between two steps may go either way: rare, and as small as a step
            assert np.median(gap) < 1e-3 * lost or gap.mean() < 0.1 * lost, (np.median(gap), gap.mean(), lost)
        else:
            assert gap.max() < 1e-5 * np.abs(expected).max()
        # half precision loses something by itself, in each layer, and moves values across steps
        noise = {"fp16": 6e-3, "bf16": 3e-2}[router.system.family.half] * np.sqrt(router.shape.layers) * np.abs(expected).std()
        assert np.abs(shipped - exact).mean() < max(noise, 0.8 * lost if precision == "int8" else 0)


@pytest.mark.parametrize("precision", QUANTISED)
def test_weights_are_the_checkpoints_and_steps_the_calibrations(router: QuantisedRouter, precision: str) -> None:
    """Up to rounding, which GPTQ spreads over a row: by a few steps for one value, by less than a step for most."""
    graph = ir.load(router.written[precision][0]).graph
    fit, fitted = router.fits[precision]
    stored = weights_of(graph)
    assert stored.keys() == {n for n, s in fit.sources.items() if s.tensors and len(fit.model.graph.initializers[n].shape) == 2}
    for name, (values, scale, block) in stored.items():
        exact = np.concatenate(list(rows(fit.sources[name], router.system.router.weights)))
        error = np.abs(widened(values, scale, block) - exact) / np.repeat(scale.reshape(len(values), -1), block, axis=1)
        assert error.mean() < 0.6 and np.median(error) < 0.5, (name, error.mean())
        assert np.abs(values).max() > (6 if scale.ndim == 2 else 120), "ranges are used"
    if isinstance(fitted, PlannedInt8):
        steps = {
            str(n.inputs[1].name).removesuffix(".turned"): float(rounding.inputs[1].const_value.numpy().astype(np.float32))
            for n in graph
            if n.op_type == "MatMul" and (rounding := n.inputs[0].producer()) is not None and rounding.op_type == "DequantizeLinear"
        }
        assert steps.keys() == fitted.plan.scales.keys() and steps
        for name, step in steps.items():
            assert 1 <= step / fitted.plan.scales[name] <= 1 + 2**-7


@pytest.mark.parametrize("precision", QUANTISED)
def test_what_is_stored_is_what_tensorrt_reads(router: QuantisedRouter, precision: str) -> None:
    """Symmetric int8 by row, or int4 in blocks that divide the width. Scales are above zero, in the activations' type."""
    path, about = router.written[precision]
    graph = ir.load(path).graph
    half = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}[router.system.family.half]
    assert {n.domain for n in graph} == {""}
    for node in graph:
        if node.op_type in ("DequantizeLinear", "QuantizeLinear"):
            assert node.inputs[1].dtype == half
            if len(node.inputs) == 3:
                assert node.inputs[2].const_value.numpy() == 0
    stored = weights_of(graph)
    for name, (_, scale, block) in stored.items():
        assert (scale > 0).all()
        width = next(
            n.inputs[0].shape[1] for n in graph if n.op_type == "DequantizeLinear" and str(n.inputs[0].name).startswith(f"{name}.int")
        )
        assert width % block == 0
        small = precision == "int4" and name not in about["sensitive"] and width % 32 == 0
        assert (block in (64, 32) and block == (64 if width % 64 == 0 else 32)) if small else block == width
    products = [n for n in graph if n.op_type == "MatMul" and str(n.inputs[1].name).endswith(".turned")]
    assert len(products) == len([name for name in stored if "embed_tokens" not in name])
    if precision == "int8":
        assert about["w8a8_share"] >= 0.6


floats = st.floats(-1000, 1000, width=32, allow_subnormal=False)


@settings(deadline=None, max_examples=200)
@given(arrays.arrays(np.float32, st.integers(1, 20), elements=st.floats(0, 60_000, width=32)))
def test_scales_are_exact_in_both_halves_and_no_smaller(values: np.ndarray) -> None:
    scales = stepped(values)
    assert (scales >= np.maximum(values, SMALLEST)).all()
    assert (scales <= np.maximum(values * np.float32(1 + 2**-7), values + SMALLEST)).all()
    assert np.array_equal(scales.astype(np.float16).astype(np.float32), scales)
    assert np.array_equal(scales.astype(ml_dtypes.bfloat16).astype(np.float32), scales)


@settings(deadline=None, max_examples=100)
@given(arrays.arrays(np.float32, (3, 2, 32), elements=floats))
def test_grids_hold_every_value(rows: np.ndarray) -> None:
    scales, zeros = row_grid(rows.reshape(3, 1, 64))
    assert zeros is None and (np.abs(rows.reshape(3, 64)) <= 127 * scales * np.float32(1.000001)).all()
    scales, _ = block_grid(rows)
    error = np.square(np.clip(np.rint(rows / scales[..., None]), -8, 7) * scales[..., None] - rows).sum(-1)
    plain = stepped(np.abs(rows).max(-1) / np.float32(7))
    reference = np.square(np.rint(rows / plain[..., None]) * plain[..., None] - rows).sum(-1)
    assert (error <= reference * 1.0001 + 1e-12).all()
