"""Graphs for TensorRT 10.3 (JetPack 6), run on ONNX Runtime as its engines run, against plain torch: full prefix, no
cache.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
import pytest
import torch
from rich.console import Console

from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.export import Request, export
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.verify.engine_graph_on_cpu import EngineGraphOnCpu
from fusionroute.fr_export.verify.torch_reference import load
from fusionroute.runtime.manifest import Manifest
from fusionroute.runtime.tensorrt.operators import known, table
from tests.support.rewinds import check_rewinds
from tests.support.sparing import sparing
from tests.support.systems import Shape, make_system

CAPACITY, TARGET = 64, "tensorrt:10.3"
SHAPES = {
    "llama3": Shape(experts=1, kv_heads=1, head_dim=20, config={"attention_bias": True, "mlp_bias": True}),
    "qwen2": Shape("qwen2", experts=1),
    "qwen3": Shape("qwen3", experts=1, config={"attention_bias": True}),
    "olmo2": Shape("olmo2", experts=1),
    "smollm3": Shape("smollm3", experts=1),
    "gemma3": Shape("gemma3", experts=1),
    "phi3": Shape("phi3", experts=1),
    "gemma2": Shape("gemma2", experts=1, config={"tie_word_embeddings": True}),  # a window of 16 in every other layer
}
SLOW = ("qwen2", "qwen3", "olmo2", "smollm3", "gemma3", "phi3")
TOLERANCE = 1e-5  # of the largest |logit|, in fp32
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def precisions(shape: Shape) -> tuple[str, ...]:
    """Gemma 2 has all."""
    return ("fp32", *HALVES, *(("int8", "int8-wo") if shape.family == "gemma2" else ()))


class Exported(NamedTuple):
    """A system exported for TensorRT 10.3, a text, and what torch says of it in each type: logits float32 [S, V],
    routing [S, n].
    """

    shape: Shape
    bundle: Path
    ids: list[int]
    said: dict[str, tuple[np.ndarray, np.ndarray]]
    report: list[dict[str, object]]

    def graph(self, precision: str) -> Path:
        return self.bundle / f"graphs/router.tensorrt-10.3.{precision}.onnx"


@pytest.fixture(scope="module", params=sparing(SHAPES, SLOW))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Every shape once, Gemma 2 in every precision."""
    folder, shape = tmp_path_factory.mktemp("jetpack"), SHAPES[request.param]
    router, experts = make_system(folder / "system", shape)
    request_ = Request(
        FAMILIES[shape.family],
        router,
        experts,
        precisions(shape),
        (TARGET,),
        folder / "bundle",
        max_seq_len=CAPACITY,
    )
    report = export(request_, Stages(Console(quiet=True)))
    system = System.open(FAMILIES[shape.family], router, experts, max_seq_len=CAPACITY)
    ids = [int(i) for i in np.random.default_rng(1).integers(3, shape.vocab, 50)]
    said = {name: ask(system, ids, dtype) for name, dtype in (("fp32", torch.float32), *HALVES.items())}
    return Exported(shape, folder / "bundle", ids, said, report["variants"])


@torch.no_grad()
def ask(system: System, ids: list[int], dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The router's logits and routing scores by transformers, full prefix and no cache."""
    model, text = load(system.router).to(dtype), torch.tensor([ids])
    hidden = model.model(input_ids=text, use_cache=False).last_hidden_state[0].float().numpy()
    logits = model(input_ids=text, use_cache=False).logits[0].float().numpy()
    return logits, hidden @ system.head.weight.T + system.head.bias


def test_chunks_and_steps_give_torchs_logits_and_routing(exported: Exported) -> None:
    model = EngineGraphOnCpu(exported.graph("fp32"))
    for chunk, spare in ((50, 0), (13, 0), (1, 0), (7, 9), (1, CAPACITY)):
        for answered, expected in zip(model.read(exported.ids, chunk, spare), exported.said["fp32"], strict=True):
            assert np.abs(answered - expected).max() < TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("precision", HALVES)
def test_half_precision_loses_no_more_than_torch_in_that_type(exported: Exported, precision: str) -> None:
    model = EngineGraphOnCpu(exported.graph(precision))
    for chunk, spare in ((50, 0), (1, 0), (7, 9)):
        answers = zip(model.read(exported.ids, chunk, spare), exported.said["fp32"], exported.said[precision], (1.25, 1.5), strict=True)
        for answered, exact, rounded, most in answers:  # routing has few values
            assert 0 < np.abs(answered - exact).mean() < most * np.abs(rounded - exact).mean()


def test_rewinds_leave_nothing_behind(exported: Exported) -> None:
    expected = exported.said["fp32"][0]
    check_rewinds(EngineGraphOnCpu(exported.graph("fp32")), exported.ids, expected, TOLERANCE * np.abs(expected).max())


def test_operators_and_opset_are_those_that_10_3_reads(exported: Exported) -> None:
    variants = Manifest.read(exported.bundle).variants
    assert [(v.target, v.precision) for v in variants] == [(TARGET, precision) for precision in precisions(exported.shape)]
    for variant in variants:
        models = [ir.load(exported.bundle / name) for name in variant.graphs.values()]
        operators = {n.op_type for model in models for n in model.graph}
        assert operators == set(variant.operators) and operators <= known("10.3")
        for model in models:
            assert model.opset_imports == {"": table()["versions"]["10.3"]["opset"]} and {n.domain for n in model.graph} == {""}
    assert {n.op_type for n in ir.load(exported.bundle / "graphs/fusion.onnx").graph} <= known("10.3")


def test_the_signature_is_that_of_tensorrt_with_new_rows_in_place_of_buffers(exported: Exported) -> None:
    shape, size = exported.shape, -(-exported.shape.head_size // 8) * 8
    caches = [f"{layer}.{kind}" for layer in range(shape.layers) for kind in ("key", "value")]
    for precision, dtype in (("fp32", ir.DataType.FLOAT), ("fp16", ir.DataType.FLOAT16), ("bf16", ir.DataType.BFLOAT16)):
        graph = ir.load(exported.graph(precision)).graph
        own = ["input_ids", "write_index", "key_positions", "logit_positions"]
        assert [v.name for v in graph.inputs] == [*own, *(f"past.{cache}" for cache in caches)]
        assert [v.name for v in graph.outputs] == ["logits", "routing", *(f"new.{cache}" for cache in caches)]
        for value in (*graph.inputs, *graph.outputs):
            if "." in str(value.name):
                rows = "sequence" if value in graph.outputs else CAPACITY
                assert value.dtype == dtype and [str(d) for d in value.shape] == [str(d) for d in (1, shape.kv_heads, rows, size)]


def test_the_report_holds_every_precision_against_torch(exported: Exported) -> None:
    for entry in exported.report:
        assert entry["not_compared"] is None
        assert entry["compared"]["decode"]["routing_agreement"] > 0.8  # type: ignore[index]
