"""Graphs that read router and expert in one pass: each segment is as if its model had read it alone, in plain torch."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionroute.fr_export.bundle.shared_base import deltas
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.graphs.dialects import ort
from fusionroute.fr_export.graphs.factor_arrays import FactorArrays, layout_of
from fusionroute.fr_export.graphs.passes import pair_segments
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision import int8
from fusionroute.fr_export.precision.bind_weights import bind
from fusionroute.fr_export.precision.fp32 import Fp32
from fusionroute.fr_export.precision.smoothquant import for_blocks, smooth
from fusionroute.runtime import FusionRuntime
from tests.support.adapters import TARGETS, make_adapted_system, peft_model
from tests.support.calibration import observe, traced
from tests.support.exporting import export_checkpoints
from tests.support.pairs import PairReader, SharedSystem, export_shared, peft_logits
from tests.support.parity import TOLERANCE
from tests.support.sparing import sparing
from tests.support.systems import Shape

SMALL: dict[str, Any] = {"heads": 2, "kv_heads": 1, "hidden": 32, "layers": 2, "tokenizer": True}
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
# the router, then the experts: some matrices or all of them, other ranks, norms too
OPTIONS: list[dict[str, Any]] = [
    {"target_modules": TARGETS[:4]},
    {"r": 3, "rank_pattern": {"q_proj": 5}},
    {"r": 2, "modules_to_save": NORMS},
]
SYSTEMS = {
    "llama3": (Shape("llama3", head_dim=16, **SMALL), OPTIONS),
    "llama3-padded-head-rotary-outside": (Shape("llama3", head_dim=20, **SMALL), OPTIONS),
    "gemma2": (Shape("gemma2", head_dim=16, **SMALL), OPTIONS),
    "qwen3": (Shape("qwen3", head_dim=16, **SMALL), [*OPTIONS[:2], {"modules_to_save": [*NORMS, "q_norm", "k_norm"]}]),
    "phi3": (Shape("phi3", **SMALL), [{"target_modules": ["qkv_proj"]}, {"target_modules": ["qkv_proj", "gate_up_proj", "down_proj"]}]),
    "qwen2": (Shape("qwen2", **SMALL), OPTIONS),
    "smollm3": (Shape("smollm3", **SMALL), [{"target_modules": ["down_proj"]}, {"target_modules": ["q_proj"]}]),
}
IDS = np.random.default_rng(5).integers(3, 300, 40).tolist()


@pytest.fixture(scope="module", params=sparing(SYSTEMS, ("qwen2", "smollm3")))
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[SharedSystem, list[np.ndarray]]:
    """A shared system in fp32, and the logits [S, V] of its models for IDS, by PEFT without merging."""
    system = export_shared(tmp_path_factory.mktemp(request.param), *SYSTEMS[request.param])
    return system, peft_logits(system, IDS)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(data=st.data())
def test_each_segment_is_as_if_its_model_had_read_it_alone(shared: tuple[SharedSystem, list[np.ndarray]], data: st.DataObject) -> None:
    """Through passes of any lengths, the expert behind the router or ahead of it."""
    system, (router, *experts) = shared
    number = data.draw(st.integers(0, len(experts) - 1), label="expert")
    reader = PairReader.open(system.bundle, "fp32", list(system.experts)[number])
    bounds = [TOLERANCE * float(np.abs(expected).max()) for expected in (router, experts[number])]
    while max(reader.router.length, reader.expert.length) < len(IDS) - 16:
        starts = reader.router.length, reader.expert.length
        stops = [start + data.draw(st.integers(1, 16)) for start in starts]
        results = reader.read(IDS[starts[0] : stops[0]], IDS[starts[1] : stops[1]])
        for result, expected, start, stop, bound in zip(results, (router, experts[number]), starts, stops, bounds, strict=False):
            assert np.abs(result - expected[start:stop]).max() <= bound


def test_experts_differ_from_the_router(shared: tuple[SharedSystem, list[np.ndarray]]) -> None:
    """The comparison above would see a delta that was left out or that reached the router."""
    _, (router, *experts) = shared
    for expert in experts:
        assert np.abs(expert - router).max() > 100 * TOLERANCE * np.abs(router).max()


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_quantised_segment_is_as_if_it_had_been_read_alone(precision: str, tmp_path: Path) -> None:
    """The router's, by the full bundle's graph; the expert's, by a pass with a dummy for a router."""
    shape, options = SYSTEMS["llama3"]
    system = export_shared(tmp_path, shape, options, (precision,))
    full = export_checkpoints(tmp_path / "full", shape, system.router, system.experts, (precision,))
    pair, alone = (PairReader.open(system.bundle, precision, "expert0") for _ in range(2))
    router, expert, routing = pair.read(IDS, IDS[:20])
    _, lone, _ = alone.read([5, 6], IDS[:20])
    with FusionRuntime.load(full, precision=precision) as runtime:
        scores = runtime.score(IDS, fusion="weighted", lam=1.0)
    assert np.array_equal(router, scores.logits)
    assert np.array_equal(routing, scores.routing)
    assert np.array_equal(expert, lone)


def test_a_segment_with_products_by_row_is_as_if_it_had_been_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row has a scale of its own: what stands beside it, and how many rows there are, changes no bit."""
    monkeypatch.setattr(int8, "ROWS", SMALL["hidden"])
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one two\nthree four\nfive six\n")
    system = export_shared(tmp_path, *SYSTEMS["llama3"], ("int8",), max_seq_len=64, calibration=str(prompts))
    operators = {each.op_type for each in ir.load(system.bundle / "graphs/base.ort-cpu.int8.onnx").graph}
    assert {"MatMulIntegerToFloat", "MatMulNBits"} <= operators
    pair, first, second = (PairReader.open(system.bundle, "int8", "expert0") for _ in range(3))
    router, expert, routing = pair.read(IDS, IDS[:20])
    lone_router, _, lone_routing = first.read(IDS, [5, 6])
    _, lone_expert, _ = second.read([5, 6], IDS[:20])
    for beside, alone in ((router, lone_router), (routing, lone_routing), (expert, lone_expert)):
        assert np.array_equal(beside, alone)


def test_scales_of_smoothing_reach_the_factors(tmp_path: Path) -> None:
    """Smoothing scales rows and columns of the base: an expert's factors and norms are scaled with them."""
    base, folder, experts = make_adapted_system(tmp_path, SYSTEMS["llama3"][0], OPTIONS)
    system = System.open(None, folder, experts)
    graph, weights, delta = traced(system), system.router.weights, deltas(system)["expert1"]
    graph = smooth(graph, weights, observe(graph, weights, [IDS]), for_blocks)[0].clone()
    ort.end_with(graph, system.head)
    matrices = [name for name in graph.sources if "_proj.weight" in name]
    vectors = [name for name in graph.sources if name.endswith("norm.weight")]
    layout = layout_of(graph, pair_segments(graph, matrices, vectors), vectors, weights)
    arrays = FactorArrays(layout, delta, system.experts[1].weights)
    bind(graph, weights, Fp32(), Store(tmp_path), lambda _: None)
    ir.save(graph.model, tmp_path / "pair.onnx")
    reader = PairReader(tmp_path / "pair.onnx", dict(zip(arrays.shapes, arrays.arrays(), strict=True)))
    router, expert, _ = reader.read(IDS, IDS)
    for logits, adapter in ((router, folder), (expert, experts["expert1"])):
        with torch.no_grad():
            expected = peft_model(base, Path(adapter))(torch.tensor([IDS])).logits[0].numpy()
        assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()
