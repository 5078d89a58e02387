"""Graphs for TensorRT, run on ONNX Runtime, against plain torch: full prefix, no cache."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import onnx_ir as ir
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from fusionroute.fr_export.bundle.targets import TARGETS
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.export import Request, export
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.graphs.dialects import ort, tensorrt
from fusionroute.fr_export.graphs.trace import trace
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision import SCHEMES
from fusionroute.fr_export.precision.bind_weights import bind
from fusionroute.fr_export.verify.engine_graph_on_cpu import EngineGraphOnCpu
from fusionroute.fr_export.verify.torch_reference import load
from tests.support.rewinds import check_rewinds
from tests.support.sparing import sparing
from tests.support.systems import Shape, make_system

CAPACITY = 64
SHAPES = {
    "llama3": Shape(experts=1, config={"tie_word_embeddings": True}),
    "llama3, biases, one KV head, padded": Shape(experts=1, kv_heads=1, head_dim=20, config={"attention_bias": True, "mlp_bias": True}),
    "gemma2": Shape("gemma2", experts=1, config={"tie_word_embeddings": True}),  # a window of 16 in every other layer
    "qwen2": Shape("qwen2", experts=1),
    "qwen3": Shape("qwen3", experts=1, config={"attention_bias": True}),
    "olmo2": Shape("olmo2", experts=1),
    "smollm3": Shape("smollm3", experts=1),
    "gemma3": Shape("gemma3", experts=1),
    "phi3": Shape("phi3", experts=1),
    "gemma2, padded head, three layers": Shape("gemma2", experts=1, layers=3, head_dim=12, kv_heads=4),
}
UNLIKE = {"gemma2", "qwen3", "phi3", "llama3, biases, one KV head, padded"}  # norms, biases and packed matrices of all kinds
SLOW = ("qwen2", "olmo2", "smollm3", "gemma3", "phi3")
TOLERANCE = 1e-5  # of the largest |logit|, in fp32
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Exported(NamedTuple):
    """A system exported for TensorRT, a text, and what torch says of it in each type: logits float32 [S, V], routing
    [S, n].
    """

    shape: Shape
    system: System
    bundle: Path
    ids: list[int]
    said: dict[str, tuple[np.ndarray, np.ndarray]]

    def graph(self, precision: str) -> Path:
        return self.bundle / f"graphs/router.tensorrt.{precision}.onnx"


@pytest.fixture(scope="module", params=sparing(SHAPES, SLOW))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Every shape once."""
    folder, shape = tmp_path_factory.mktemp("tensorrt"), SHAPES[request.param]
    router, experts = make_system(folder / "system", shape)
    with patch("fusionroute.fr_export.export.measure", return_value=({}, "a test compares it")):
        request_ = Request(
            FAMILIES[shape.family], router, experts, ("fp32", *HALVES), ("tensorrt",), folder / "bundle", max_seq_len=CAPACITY
        )
        export(request_, Stages(Console(quiet=True)))
    system = System.open(FAMILIES[shape.family], router, experts, max_seq_len=CAPACITY)
    ids = [int(i) for i in np.random.default_rng(1).integers(3, shape.vocab, 50)]
    said = {"fp32": ask(system, ids, torch.float32)} | {name: ask(system, ids, dtype) for name, dtype in HALVES.items()}
    return Exported(shape, system, folder / "bundle", ids, said)


@torch.no_grad()
def ask(system: System, ids: list[int], dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The router's logits and routing scores by transformers, full prefix and no cache."""
    model, text = load(system.router).to(dtype), torch.tensor([ids])
    hidden = model.model(input_ids=text, use_cache=False).last_hidden_state[0].float().numpy()
    logits = model(input_ids=text, use_cache=False).logits[0].float().numpy()
    return logits, hidden @ system.head.weight.T + system.head.bias


def chunkings(model: EngineGraphOnCpu, ids: list[int]) -> Iterator[list[np.ndarray]]:
    """A text read in chunks and steps, also with more keys than needed."""
    for chunk, spare in ((50, 0), (13, 0), (1, 0), (7, 9), (1, CAPACITY)):
        yield model.read(ids, chunk, spare)


def test_chunks_and_steps_give_torchs_logits_and_routing(exported: Exported) -> None:
    for answer in chunkings(EngineGraphOnCpu(exported.graph("fp32")), exported.ids):
        for answered, expected in zip(answer, exported.said["fp32"], strict=True):
            assert np.abs(answered - expected).max() < TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("precision", HALVES)
def test_half_precision_loses_no_more_than_torch_in_that_type(exported: Exported, precision: str) -> None:
    for answer in chunkings(EngineGraphOnCpu(exported.graph(precision)), exported.ids):
        for answered, exact, rounded in zip(answer, exported.said["fp32"], exported.said[precision], strict=True):
            lost = np.abs(answered - exact).mean()
            assert 0 < lost < 1.25 * np.abs(rounded - exact).mean(), (lost, np.abs(rounded - exact).mean())


def test_rewinds_leave_nothing_behind(exported: Exported) -> None:
    expected = exported.said["fp32"][0]
    check_rewinds(EngineGraphOnCpu(exported.graph("fp32")), exported.ids, expected, TOLERANCE * np.abs(expected).max())


def test_the_signature_is_the_contract(exported: Exported) -> None:
    layers, shape = exported.shape.layers, exported.shape
    caches = [f"{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
    size = -(-shape.head_size // 8) * 8
    for precision, dtype in (("fp32", ir.DataType.FLOAT), ("fp16", ir.DataType.FLOAT16), ("bf16", ir.DataType.BFLOAT16)):
        graph = ir.load(exported.graph(precision)).graph
        assert [v.name for v in graph.inputs] == [
            *("input_ids", "write_index", "key_positions", "logit_positions"),
            *(f"past.{cache}" for cache in caches),
        ]
        assert [v.name for v in graph.outputs] == ["logits", "routing", *(f"present.{cache}" for cache in caches)]
        for value in (*graph.inputs, *graph.outputs):
            if "." in value.name:
                assert value.dtype == dtype and list(value.shape) == [1, shape.kv_heads, CAPACITY, size]
            else:
                assert value.dtype == (ir.DataType.FLOAT if value in graph.outputs else ir.DataType.INT64)
        assert [list(map(str, v.shape)) for v in graph.inputs[:4]] == [["1", "sequence"], ["1"], ["keys"], ["positions"]]
        assert {n.domain for n in graph} == {""}


def test_gemma2_beyond_65504_is_finite_and_right(tmp_path: Path) -> None:
    """Residual stream and gate · up both leave fp16's range, as those of real checkpoints do."""
    shape = Shape("gemma2", experts=1, layers=2)
    router, experts = make_system(tmp_path / "system", shape)
    tensors = load_file(Path(router) / "model.safetensors")
    for name in tensors:
        if name.endswith("post_feedforward_layernorm.weight"):
            tensors[name] = 5e4 * (1 + 0.1 * tensors[name])
        if name.endswith("pre_feedforward_layernorm.weight"):
            tensors[name] = 150 * (1 + 0.1 * tensors[name])
    save_file(tensors, Path(router) / "model.safetensors", {"format": "pt"})
    system = System.open(FAMILIES["gemma2"], router, experts, max_seq_len=CAPACITY)
    ids = [int(i) for i in np.random.default_rng(1).integers(3, shape.vocab, 50)]
    (logits, routing), largest = ask(system, ids, torch.float32), []
    model = load(system.router)
    model.model.layers[-1].register_forward_hook(lambda _, __, out: largest.append((out[0] if isinstance(out, tuple) else out).abs().max()))
    model(torch.tensor([ids]))
    assert largest[0] > 65_504
    graph, target = trace(system.family, system.router.config, system.vocab_size, CAPACITY, tensorrt), TARGETS["tensorrt"]
    for precision, most in (("fp16", 0.01), ("bf16", 0.05)):
        own = graph.clone()
        target.prepare(own, precision, system.family)
        target.dialect.end_with(own, system.head)
        bind(own, system.router.weights, SCHEMES["tensorrt"][precision], Store(tmp_path), lambda _: None)
        ir.save(own.model, tmp_path / f"{precision}.onnx")
        answers = EngineGraphOnCpu(tmp_path / f"{precision}.onnx").read(ids, 7)
        for mine, exact in zip(answers, (logits, routing), strict=True):
            assert np.isfinite(mine).all() and np.abs(mine - exact).mean() < most * exact.std()


@pytest.mark.parametrize("name", sparing(SHAPES, SHAPES.keys() - UNLIKE))
def test_both_dialects_read_the_same_weights(name: str) -> None:
    """What is fitted on one serves the other."""
    shape = replace(SHAPES[name], layers=1)
    one, other = (trace(FAMILIES[shape.family], shape.build(False), shape.vocab, CAPACITY, dialect) for dialect in (ort, tensorrt))
    weights = [{name: source for name, source in graph.sources.items() if source.tensors} for graph in (one, other)]
    assert weights[0] == weights[1] and one.cache == other.cache


def test_graphs_say_nothing_of_the_machine_that_made_them(exported: Exported) -> None:
    for path in exported.bundle.glob("graphs/*.onnx"):
        assert b".py" not in path.read_bytes() and b"/" not in b"".join(name.encode() for name in ir.load(path).metadata_props)


def test_attention_is_one_operator_where_nothing_caps_its_scores(exported: Exported) -> None:
    graph = ir.load(exported.graph("fp16")).graph
    operators = [n.op_type for n in graph]
    capped = exported.shape.family == "gemma2"
    assert operators.count("Attention") == (0 if capped else exported.shape.layers)
    assert operators.count("Softmax") == (exported.shape.layers if capped else 0)
    for n in graph:  # what sums or exponentiates does so in fp32
        if n.op_type == "Softmax" or (n.op_type == "Tanh" and capped):
            assert n.outputs[0].dtype == ir.DataType.FLOAT


def test_a_wide_residual_stream_stays_in_fp32(exported: Exported) -> None:
    for precision, dtype in (("fp16", ir.DataType.FLOAT16), ("bf16", ir.DataType.BFLOAT16)):
        graph = ir.load(exported.graph(precision)).graph
        wide = FAMILIES[exported.shape.family].wide_residual
        norms = [n for n in graph if n.op_type == "RMSNormalization"]
        assert {n.inputs[0].dtype for n in norms} == {ir.DataType.FLOAT if wide else dtype}
        products = [n for n in graph if n.op_type == "MatMul" and "routing" not in str(n.inputs[1].name)]
        assert {value.dtype for n in products for value in n.inputs} == {dtype}
        scatters = [n for n in graph if n.op_type == "TensorScatter"]
        assert {n.inputs[1].dtype for n in scatters} == {dtype}
