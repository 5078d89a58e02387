"""Adapters merged while they are read are what PEFT makes of them, for every variety that PEFT writes."""

import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fusionroute.fr_export.checkpoints import weights
from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.checkpoints.sources.lora import LoraAdapter
from fusionroute.fr_export.checkpoints.sources.merge_lora import merge
from fusionroute.fr_export.checkpoints.tensors import ReadRows, StoredTensor
from fusionroute.fr_export.checkpoints.torch_model import torch_model
from fusionroute.fr_export.families import FAMILIES
from tests.support.adapters import SHAPE, TARGETS, make_adapter, peft_model
from tests.support.damaged_checkpoints import edit
from tests.support.gguf_models import write_gguf
from tests.support.packed_checkpoints import quantise
from tests.support.systems import make_model

IDS = torch.arange(3, 60).reshape(1, -1)
TIGHT = 2e-6  # of the largest |logit|: fp32 in another order
VARIETIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns": {"rank_pattern": {"q_proj": 2, r"layers\.0\.mlp\.up_proj": 7}, "alpha_pattern": {"v_proj": 5, "up_proj": 3}},
    "rslora": {"use_rslora": True, "rank_pattern": {"k_proj": 2}},
    "saved norms": {"modules_to_save": ["input_layernorm", "norm"]},
    "all biases": {"bias": "all", "target_modules": ["q_proj", "o_proj"]},
    "adapted biases": {"bias": "lora_only", "target_modules": ["q_proj", "o_proj"]},
    "lora bias": {"lora_bias": True, "target_modules": ["q_proj", "o_proj"]},
    "fan in fan out": {"fan_in_fan_out": True},
    "dora": {"use_dora": True, "use_rslora": True},
    "embedding and head": {"target_modules": [*TARGETS, "embed_tokens", "lm_head"]},
    "dora of embedding and head": {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True},
    "saved embedding and head": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "new rows": {"trainable_token_indices": [3, 7, 299]},
    "new rows of both": {"trainable_token_indices": {"embed_tokens": [5, 4], "lm_head": [8]}},
    "one layer": {"layers_to_transform": [0], "layers_pattern": "layers"},
    "regular expression": {"target_modules": r".*self_attn\.(q|v)_proj", "exclude_modules": ["k_proj"]},
    "gaussian start": {"init_lora_weights": "gaussian"},
    "orthogonal start": {"init_lora_weights": "orthogonal"},
}
TIED: dict[str, dict[str, Any]] = {
    "plain": {},
    "embedding": {"target_modules": ["embed_tokens"]},
    "head": {"target_modules": ["lm_head"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "both kept tied": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "saved embedding": {"modules_to_save": ["embed_tokens"]},
    "saved embedding and head kept tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "saved head": {"modules_to_save": ["lm_head"]},
    "new rows": {"trainable_token_indices": [3, 7]},
    "new rows of the head": {"trainable_token_indices": {"lm_head": [3, 7]}},
}


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("untied"), replace(SHAPE, config={"attention_bias": True}), 0, expert=False)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tied"), replace(SHAPE, config={"tie_word_embeddings": True}), 0, expert=False)


@torch.no_grad()
def difference(base: Path, adapter: Path) -> float:
    """The largest difference to PEFT's logits, as a part of the largest |logit|. The adapter changes them by far more."""
    expected = peft_model(base, adapter)(IDS).logits
    unadapted = torch_model(Checkpoint.open("base", str(base)))(IDS).logits
    merged = torch_model(Checkpoint.open("adapted", str(adapter)))(IDS).logits
    scale = expected.abs().max()
    assert (expected - unadapted).abs().max() > 1e-2 * scale, "the adapter does nothing: the comparison would prove nothing"
    return float((merged - expected).abs().max() / scale)


@pytest.mark.parametrize("variety", VARIETIES)
def test_logits_are_those_of_peft(variety: str, untied: Path, tmp_path: Path) -> None:
    assert difference(untied, make_adapter(untied, tmp_path / "adapter", **VARIETIES[variety])) <= TIGHT


@pytest.mark.parametrize("variety", TIED)
def test_tied_bases(variety: str, tied: Path, tmp_path: Path) -> None:
    """Where the adapter parts embedding and head, both are exported."""
    adapter = make_adapter(tied, tmp_path / "adapter", **TIED[variety])
    assert difference(tied, adapter) <= TIGHT
    parted = variety not in ("plain", "new rows", "saved embedding and head kept tied")
    adapted = Checkpoint.open("adapted", str(adapter))
    assert ("lm_head.weight" in adapted.weights) == parted == (not adapted.config.tie_word_embeddings)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    """Packed projections, norms on queries, scaled embeddings: names are the family's, sums are the same."""
    base = make_model(tmp_path / "base", replace(SHAPE, family=family), 0, expert=False)
    targets = r".*(embed_tokens|qkv_proj|[qkvo]_proj|(gate|up|down|gate_up)_proj)"
    assert difference(base, make_adapter(base, tmp_path / "adapter", target_modules=targets, modules_to_save=["norm"])) <= TIGHT


def test_resized_embedding(tied: Path, untied: Path, tmp_path: Path) -> None:
    """PEFT saves an embedding that was given more rows whole, and the head with it."""
    for base in (tied, untied):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(307)
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False))
        adapted.save_pretrained(tmp_path / base.name)
        checkpoint = Checkpoint.open("adapted", str(tmp_path / base.name))
        assert checkpoint.config.vocab_size == 307
        start = AutoModelForCausalLM.from_pretrained(base)
        start.resize_token_embeddings(307)
        with torch.no_grad():
            expected = PeftModel.from_pretrained(start, tmp_path / base.name)(IDS + 245).logits
            assert (torch_model(checkpoint)(IDS + 245).logits - expected).abs().max() <= TIGHT * expected.abs().max()


@settings(max_examples=8, deadline=None)
@given(
    rank=st.integers(1, 40),
    alpha=st.integers(1, 64),
    ranks=st.dictionaries(st.sampled_from(TARGETS), st.integers(1, 40), max_size=3),
    alphas=st.dictionaries(st.sampled_from(TARGETS), st.integers(1, 64), max_size=3),
    rslora=st.booleans(),
    dora=st.booleans(),
    targets=st.sets(st.sampled_from(TARGETS), min_size=1),
    rows=st.tuples(st.integers(0, 40), st.integers(1, 40)),
)
def test_merged_rows_are_those_of_peft(
    tmp_path_factory: pytest.TempPathFactory,
    untied: Path,
    rank: int,
    alpha: int,
    ranks: dict[str, int],
    alphas: dict[str, int],
    rslora: bool,
    dora: bool,
    targets: set[str],
    rows: tuple[int, int],
) -> None:
    """Every tensor, whole and in any rows, is that of merge_and_unload."""
    adapter = make_adapter(
        untied, tmp_path_factory.mktemp("adapter"), rank, r=rank, lora_alpha=alpha, rank_pattern=ranks, alpha_pattern=alphas,
        use_rslora=rslora, use_dora=dora, target_modules=sorted(targets),
    )  # fmt: skip
    expected = peft_model(untied, adapter).merge_and_unload().state_dict()
    adapted = Checkpoint.open("adapted", str(adapter)).weights
    for name, tensor in expected.items():
        assert np.allclose(adapted.read(name), tensor.numpy(), rtol=1e-5, atol=1e-5), name
        with adapted.entry(name).open() as read:
            start = min(rows[0], len(tensor) - 1)
            part = read(start, min(start + rows[1], len(tensor)))
            assert torch.allclose(part, tensor[start : start + rows[1]], rtol=1e-5, atol=1e-5), name


def test_bases_that_are_quantised_already(untied: Path, tmp_path: Path) -> None:
    """An adapter goes over what the base's codes stand for: over GPTQ, and over GGUF named with --base."""
    model = AutoModelForCausalLM.from_pretrained(untied)
    gptq, file = tmp_path / "gptq", tmp_path / "model.gguf"
    values = {
        gptq: quantise(Path(shutil.copytree(untied, gptq)), "gptq"),
        file: write_gguf(file, model, "llama", GGMLQuantizationType.Q8_0),
    }
    for base, held in values.items():
        dequantised = Path(shutil.copytree(untied, tmp_path / f"{base.name}-values"))
        save_file(held, dequantised / "model.safetensors", {"format": "pt"})
        adapter = make_adapter(dequantised, tmp_path / f"{base.name}-adapter")
        with torch.no_grad():
            expected = peft_model(dequantised, adapter)(IDS).logits
            checkpoint = Checkpoint.open("adapted", str(adapter), base=str(base))
            logits = torch_model(checkpoint)(IDS).logits
        assert (logits - expected).abs().max() <= TIGHT * expected.abs().max()
        assert any("of its base: it was quantised already" in note for note in checkpoint.source.notes)


def test_adapters_of_models_that_read_images_too(untied: Path, tmp_path: Path) -> None:
    """Names and patterns of the whole model; the base is its language model alone."""
    inside = "base_model.model.model.language_model."
    options: dict[str, Any] = {"rank_pattern": {"layers.0.mlp.up_proj": 3}, "alpha_pattern": {"layers.0.mlp.up_proj": 5}}
    adapter = make_adapter(untied, tmp_path / "adapter", **options)
    alone = Checkpoint.open("adapted", str(adapter)).weights
    expected = {name: alone.read(name) for name in alone.entries}
    file = adapter / "adapter_model.safetensors"
    tensors = {name.replace("base_model.model.model.", inside): tensor for name, tensor in load_file(file).items()}
    vision = {f"base_model.model.model.vision_tower.layers.0.q_proj.lora_{factor}.weight": torch.ones(4, 4) for factor in "AB"}
    save_file(tensors | vision, file)
    full = {key: {f"model.language_model.{name}": value for name, value in pattern.items()} for key, pattern in options.items()}
    edit(adapter / "adapter_config.json", **full)
    adapted = Checkpoint.open("adapted", str(adapter)).weights
    for name, values in expected.items():
        assert np.array_equal(adapted.read(name), values), name


@dataclass(frozen=True)
class Watched:
    """A tensor that notes which rows are read of it, and which of its slices are still held by somebody."""

    stored: StoredTensor
    asked: list[tuple[int, int]] = field(default_factory=list)
    slices: list[weakref.ref[torch.Tensor]] = field(default_factory=list)

    @property
    def files(self) -> tuple[Path, ...]:
        return self.stored.files

    @property
    def dtype(self) -> str:
        return self.stored.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @contextmanager
    def open(self) -> Iterator[ReadRows]:
        with self.stored.open() as read:

            def watched(start: int, stop: int) -> torch.Tensor:
                self.asked.append((start, stop))
                rows = read(start, stop)
                self.slices.append(weakref.ref(rows))
                return rows

            yield watched


@pytest.mark.parametrize("dora", [False, True])
def test_rows_are_merged_as_they_are_read(dora: bool, untied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice of a merged tensor reads the same slice of base and B once, and keeps neither."""
    adapter = LoraAdapter.open(make_adapter(untied, tmp_path / "adapter", use_dora=dora), "The adapter")
    base = {name: Watched(tensor) for name, tensor in Checkpoint.open("base", str(untied)).weights.entries.items()}
    tensors, _ = merge(adapter, base, tied=False)
    assert not any(tensor.asked for tensor in base.values()), "opening reads no values"
    name = "model.layers.0.mlp.up_proj.weight"  # [64, 32]
    monkeypatch.setattr(weights, "SLICE", 10 * 32)
    slices = list(weights.Weights(adapter.folder, tensors).rows(name))
    assert base[name].asked == [(start, min(start + 10, 64)) for start in range(0, 64, 10)]
    assert [len(part) for part in slices] == [10] * 6 + [4]
    assert not any(slice_() is not None for slice_ in base[name].slices)


def test_half_precision_adds_in_fp32(tmp_path: Path) -> None:
    """A bf16 base under a bf16 adapter: the sum keeps what bf16 would round away."""
    base = make_model(tmp_path / "base", replace(SHAPE, dtype=torch.bfloat16), 0, expert=False)
    adapter = make_adapter(base, tmp_path / "adapter")
    expected = peft_model(base, adapter).merge_and_unload().state_dict()
    adapted = Checkpoint.open("adapted", str(adapter)).weights
    name = "model.layers.0.mlp.up_proj.weight"
    assert adapted.entry(name).dtype == "BF16"
    assert np.allclose(adapted.read(name), expected[name].numpy(), rtol=1e-5, atol=1e-6)
    assert not np.allclose(adapted.read(name), expected[name].bfloat16().float().numpy(), rtol=1e-5, atol=1e-6)
