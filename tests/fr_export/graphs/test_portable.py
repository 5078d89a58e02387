"""Graphs for Optimum, run on ONNX Runtime as Optimum runs them, against transformers: full prefix, no cache."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.numpy import load_file

from fusionroute.fr_export.bundle.targets import TARGETS
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.export import Request, export
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.graphs.dialects import portable
from fusionroute.fr_export.graphs.trace import trace
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision import SCHEMES
from fusionroute.fr_export.precision.bind_weights import bind
from fusionroute.fr_export.verify.torch_reference import load
from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.errors import UnavailableError
from fusionroute.runtime.manifest import Manifest
from tests.support.portable_graph import Reader, positions
from tests.support.sparing import sparing
from tests.support.stored_weights import stored_weights
from tests.support.systems import CONFIGS, Shape, make_system

SHAPES = {
    "llama3": Shape(experts=1, tokenizer=True, config={"tie_word_embeddings": True}),
    "qwen2": Shape("qwen2", experts=1),
    "qwen3": Shape("qwen3", experts=1, config={"attention_bias": True}),
    "olmo2": Shape("olmo2", experts=1),
    "smollm3": Shape("smollm3", experts=1, tokenizer=True),
    "gemma3": Shape("gemma3", experts=1),
    "phi3": Shape("phi3", experts=1),
    # a window of 16 in every other layer
    "gemma2": Shape("gemma2", experts=1, head_dim=20, config={"tie_word_embeddings": True}),
}
SLOW = ("qwen2", "qwen3", "olmo2", "smollm3", "gemma3", "phi3")
PRECISIONS = ("fp32", "fp16", "int8")
FILES = {"fp32": "model.onnx", "fp16": "model_fp16.onnx", "int8": "model_int8.onnx"}
TOLERANCE = 1e-5  # of the largest |logit|, in fp32
TEXT = 50
CHUNKINGS = ((TEXT,), (20, *(1,) * 30), (1,) * TEXT, (7, 1, 13, 1, 28))


PRIMITIVE = {
    "Abs", "Add", "And", "Cast", "Concat", "Constant", "Cos", "DequantizeLinear", "Div", "Equal", "Gather", "Gelu", "GreaterOrEqual", "Less",
    "MatMul", "Max", "Mul", "Neg", "Not", "Pow", "Range", "ReduceMax", "ReduceMean", "Reshape", "Shape", "Sigmoid", "Sin", "Slice", "Softmax",
    "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip


class Exported(NamedTuple):
    """A system exported for Optimum."""

    shape: Shape
    system: System
    bundle: Path

    def folder(self, name: str = "router") -> Path:
        return self.bundle / "portable" / name


@pytest.fixture(scope="module", params=sparing(SHAPES, SLOW))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Every shape once."""
    folder, shape = tmp_path_factory.mktemp("portable"), SHAPES[request.param]
    router, experts = make_system(folder / "system", shape)
    with patch("fusionroute.fr_export.export.measure", return_value=({}, "a test compares it")):
        request_ = Request(FAMILIES[shape.family], router, experts, PRECISIONS, ("portable",), folder / "bundle", calibration="none")
        export(request_, Stages(Console(quiet=True)))
    return Exported(shape, System.open(FAMILIES[shape.family], router, experts), folder / "bundle")


def texts(vocab: int, padding: int = 9, length: int = TEXT, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Two texts of random ids and their mask; the second has padding on the left."""
    ids = np.random.default_rng(seed).integers(3, vocab, (2, length))
    mask = np.ones_like(ids)
    mask[1, :padding] = 0
    return ids, mask


@torch.no_grad()
def ask(model: torch.nn.Module, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """transformers' logits float32 [B, S, V], with its own masks and attention."""
    given, unpadded, where = (torch.tensor(part) for part in (ids, mask, positions(mask)))
    logits: np.ndarray = model(input_ids=given, attention_mask=unpadded, position_ids=where, use_cache=False).logits.float().numpy()
    return logits


@pytest.mark.parametrize("name", ["router", "expert0"])
def test_prefill_steps_and_padding_give_torchs_logits(exported: Exported, name: str) -> None:
    ids, mask = texts(exported.shape.vocab)
    expected = ask(load(exported.system.models[name != "router"]), ids, mask)
    reader, unpadded = Reader(exported.folder(name) / "model.onnx"), mask == 1
    for chunks in CHUNKINGS:
        logits = reader.read(ids, mask, chunks)
        assert logits.dtype == np.float32 and np.isfinite(logits).all()
        assert np.abs(logits - expected)[unpadded].max() < TOLERANCE * np.abs(expected).max()


def test_fp16_loses_no_more_than_torch_in_fp16(exported: Exported) -> None:
    ids, mask = texts(exported.shape.vocab)
    model, unpadded = load(exported.system.router), mask == 1
    exact, rounded = ask(model, ids, mask)[unpadded], ask(model.half(), ids, mask)[unpadded]
    for chunks in CHUNKINGS[1:]:
        logits = Reader(exported.folder() / FILES["fp16"]).read(ids, mask, chunks)
        assert np.isfinite(logits).all()
        assert 0 < np.abs(logits[unpadded] - exact).mean() < 1.25 * np.abs(rounded - exact).mean()


def test_int8_is_torch_with_rounded_matrices(exported: Exported) -> None:
    """One scale per row, of 8 significant bits; nothing else is rounded."""
    ids, mask = texts(exported.shape.vocab)
    model, unpadded = load(exported.system.router), mask == 1
    for parameter in model.parameters():
        if parameter.ndim == 2:
            scale = parameter.data.abs().amax(1, keepdim=True).double() / 127
            unit = 2.0 ** (torch.floor(torch.log2(scale)) - 7)
            scale = torch.ceil(scale / unit - 1e-6) * unit
            parameter.data = ((parameter.data / scale).round() * scale).float()
    expected = ask(model, ids, mask)
    exact = ask(load(exported.system.router), ids, mask)
    logits = Reader(exported.folder() / FILES["int8"]).read(ids, mask, CHUNKINGS[1])
    assert np.abs(logits - expected)[unpadded].max() < 4 * TOLERANCE * np.abs(expected).max()
    assert np.abs(logits - exact)[unpadded].max() > 100 * TOLERANCE * np.abs(exact).max()


def test_the_signature_is_optimums(exported: Exported) -> None:
    size = exported.shape.head_size
    caches = [f"{layer}.{kind}" for layer in range(exported.shape.layers) for kind in ("key", "value")]
    total = "past_sequence_length + sequence_length"
    for precision in PRECISIONS:
        reader = Reader(exported.folder() / FILES[precision])
        real = "tensor(float16)" if precision == "fp16" else "tensor(float)"
        assert reader.inputs == [
            ("input_ids", "tensor(int64)", ["batch_size", "sequence_length"]),
            ("attention_mask", "tensor(int64)", ["batch_size", total]),
            ("position_ids", "tensor(int64)", ["batch_size", "sequence_length"]),
            *((f"past_key_values.{name}", real, ["batch_size", "key_value_heads", "past_sequence_length", "head_size"]) for name in caches),
        ]
        assert reader.outputs == [
            ("logits", "tensor(float)", ["batch_size", "sequence_length", exported.shape.vocab]),
            *((f"present.{name}", real, ["batch_size", exported.shape.kv_heads, total, size]) for name in caches),
        ]


def test_empty_caches_may_have_the_shape_that_optimum_guesses(exported: Exported) -> None:
    """For families that it does not list: as many heads as queries have, of hidden size / heads."""
    ids, mask = texts(exported.shape.vocab, length=8)
    reader = Reader(exported.folder() / "model.onnx")
    guessed = (exported.shape.heads, exported.shape.hidden // exported.shape.heads)
    assert (reader.read(ids, mask, (5, 3), guessed) == reader.read(ids, mask, (5, 3))).all()


def test_operators_are_onnx_20s_own_and_primitive(exported: Exported) -> None:
    for precision in PRECISIONS:
        model = ir.load(exported.folder() / FILES[precision])
        assert model.opset_imports == {"": 20} and {n.domain for n in model.graph} == {""}
        assert {n.op_type for n in model.graph} <= PRIMITIVE
        for n in model.graph:  # sums of squares and shares of attention are fp32 whatever the activations are
            if n.op_type in ("ReduceMean", "Softmax", "Where"):
                assert n.outputs[0].dtype == ir.DataType.FLOAT


def test_a_folder_is_complete_alone(exported: Exported, tmp_path: Path) -> None:
    for model in exported.system.models:
        folder = shutil.copytree(exported.folder(model.name), tmp_path / model.name)
        ids, mask = texts(exported.shape.vocab, length=4)
        for precision in PRECISIONS:
            original = Reader(exported.folder(model.name) / FILES[precision]).read(ids, mask, (4,))
            assert (Reader(folder / FILES[precision]).read(ids, mask, (4,)) == original).all()
        config = json.loads((folder / "config.json").read_text())
        expected = json.loads((model.folder / "config.json").read_text()) | {"vocab_size": exported.shape.vocab, "use_cache": True}
        assert config == {key: value for key, value in expected.items() if key != "_name_or_path"}
        generation = json.loads((folder / "generation_config.json").read_text())
        assert generation["eos_token_id"] == 2 and generation["bos_token_id"] == 1
        assert (folder / "tokenizer.json").exists() == exported.shape.tokenizer
        assert {weight.file for name in FILES.values() for weight in stored_weights(folder / name).values()} == {folder / "model.onnx_data"}
        assert not (folder / "weights").exists()
        head = folder / "routing_head.safetensors"
        assert head.exists() == (model.name == "router")
        if head.exists():
            tensors = load_file(head)
            assert (tensors["routing_head.weight"] == exported.system.head.weight).all()
            assert (tensors["routing_head.bias"] == exported.system.head.bias).all()


def test_the_bundle_is_whole_and_its_runtime_says_whom_it_is_for(exported: Exported) -> None:
    Bundle.open(exported.bundle).verify()
    variants = Manifest.read(exported.bundle).variants
    assert [(v.target, v.precision, v.graphs["router"]) for v in variants] == [
        ("portable", precision, f"portable/router/{FILES[precision]}") for precision in PRECISIONS
    ]
    sentence = r"^The bundle .* has no graphs for ort:cpu, only for portable \(for Optimum's ORTModelForCausalLM\): export it with --target ort:cpu\.$"
    with pytest.raises(UnavailableError, match=sentence):
        FusionRuntime.load(exported.bundle)


@settings(max_examples=2, deadline=None, phases=(Phase.explicit, Phase.generate))  # shrinking would trace for minutes
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    heads=st.sampled_from([(1, 1), (4, 1), (4, 2), (2, 2)]),
    head_dim=st.sampled_from([6, 8, 16]),
    window=st.integers(1, 12),
    padding=st.integers(0, 20),
    chunks=st.lists(st.integers(1, 9), min_size=4, max_size=6),
    biased=st.booleans(),
)
def test_any_shape(
    tmp_path_factory: pytest.TempPathFactory, family: str, heads: tuple[int, int], head_dim: int, window: int, padding: int, chunks: list[int], biased: bool,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("shape")
    own = {"sliding_window": window} if "sliding_window" in CONFIGS[family][1] else {"mlp_bias": biased}
    shape = Shape(family, *heads, head_dim, hidden=32, experts=1, config=own | {"attention_bias": biased})
    router, experts = make_system(folder, shape)
    system = System.open(FAMILIES[family], router, experts)
    graph = trace(system.family, system.router.config, system.vocab_size, system.max_seq_len, portable)
    TARGETS["portable"].prepare(graph, "fp32", system.family)
    portable.end_with(graph, system.head)
    bind(graph, system.router.weights, SCHEMES["portable"]["fp32"], Store(folder), lambda _: None)
    ir.save(graph.model, folder / "model.onnx")
    ids, mask = texts(shape.vocab, min(padding, sum(chunks) - 1), sum(chunks))
    expected = ask(load(system.router), ids, mask)
    logits = Reader(folder / "model.onnx").read(ids, mask, chunks)
    assert np.abs(logits - expected)[mask == 1].max() < TOLERANCE * np.abs(expected).max()
