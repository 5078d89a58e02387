"""What experts add to the router: the whole difference of models that PEFT merged, or a sentence."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.checkpoints.deltas import delta_of
from fusionroute.fr_export.checkpoints.sources.low_rank import whole
from fusionroute.runtime.errors import InputError
from tests.support.adapters import SHAPE, TARGETS, make_adapter, peft_model
from tests.support.systems import make_model

BIASED = replace(SHAPE, config={"attention_bias": True})
PLAIN: dict[str, Any] = {"target_modules": ["q_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base"), BIASED, 0, expert=False)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(ranks=st.tuples(st.integers(1, 9), st.integers(1, 9)), targets=st.tuples(*[st.sets(st.sampled_from(TARGETS), min_size=1)] * 2))
def test_the_routers_weights_and_the_terms_make_the_experts(
    ranks: tuple[int, int], targets: tuple[set[str], set[str]], base: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("adapters")
    adapters = [
        make_adapter(base, folder / str(n), n, r=rank, target_modules=sorted(names))
        for n, (rank, names) in enumerate(zip(ranks, targets, strict=True))
    ]
    opened, other = (Checkpoint.open("router" if n == 0 else "math", str(adapter)) for n, adapter in enumerate(adapters))
    delta = delta_of(opened, other)
    router, expert = (peft_model(base, adapter).merge_and_unload().state_dict() for adapter in adapters)
    for name, weight in router.items():
        terms = delta.terms.get(name, ())
        module = name.removesuffix(".weight").rpartition(".")[2]
        assert delta.rank(name) == sum(rank for rank, names in zip(ranks, targets, strict=True) if module in names)
        total = weight + sum(term.scale * whole(term.b) @ whole(term.a) for term in terms)
        torch.testing.assert_close(total, expert[name], rtol=0, atol=1e-5)
    assert not delta.vectors
    assert delta.values == sum(part.numel() for terms in delta.terms.values() for term in terms for part in (whole(term.a), whole(term.b)))


def test_norms_are_told_apart(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "norms", **PLAIN, modules_to_save=["input_layernorm"])
    delta = delta_of(Checkpoint.open("router", str(base)), Checkpoint.open("math", str(adapter)))
    assert delta.vectors == {"model.layers.0.input_layernorm.weight"}


def test_biases_are_told_apart(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "biases", **PLAIN, bias="all")
    delta = delta_of(Checkpoint.open("router", str(base)), Checkpoint.open("math", str(adapter)))
    assert delta.vectors == {f"model.layers.0.self_attn.{name}_proj.bias" for name in "qkvo"}


def test_matrices_that_are_others_can_be_approximated(base: Path, tmp_path: Path) -> None:
    """Beside them, what is a low-rank term stays one."""
    adapter = make_adapter(base, tmp_path / "adapter", **PLAIN, modules_to_save=["up_proj", "embed_tokens"])
    delta = delta_of(Checkpoint.open("router", str(base)), Checkpoint.open("math", str(adapter)), approximate=True)
    assert delta.matrices == {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"}
    assert delta.terms.keys() == {"model.layers.0.self_attn.q_proj.weight"}


def test_a_refusal_says_how_far_apart_two_matrices_are(base: Path, tmp_path: Path) -> None:
    other = one_other_value(base, tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    apart = 1 / load_file(base / "model.safetensors")[name].norm()
    with pytest.raises(InputError, match=f"a '{name}' each, {apart:.2g} of its size apart"):
        delta_of(Checkpoint.open("router", str(base)), Checkpoint.open("math", str(other)))


def test_a_copy_of_the_base_is_the_base(base: Path, tmp_path: Path) -> None:
    """Such as a router that is the base and a routing head."""
    shutil.copytree(base, tmp_path / "copy")
    adapter = make_adapter(base, tmp_path / "adapter", **PLAIN)
    copy, expert = Checkpoint.open("router", str(tmp_path / "copy")), Checkpoint.open("math", str(adapter))
    assert delta_of(copy, Checkpoint.open("math", str(base))).terms == {}
    assert delta_of(copy, expert).terms.keys() == {"model.layers.0.self_attn.q_proj.weight"}


def another_base(base: Path, folder: Path) -> Path:
    return make_adapter(make_model(folder / "other", BIASED, 1, expert=False), folder / "adapter", **PLAIN)


def one_other_value(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder / "other")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][-1, -1] += 1
    save_file(tensors, folder / "other" / "model.safetensors", {"format": "pt"})
    return folder / "other"


def wider(base: Path, folder: Path) -> Path:
    return make_model(folder / "other", replace(BIASED, hidden=48), 0, expert=False)


def tied(base: Path, folder: Path) -> Path:
    return make_model(folder / "other", replace(SHAPE, config=BIASED.config | {"tie_word_embeddings": True}), 0, expert=False)


def adapter(**options: Any) -> Any:
    return lambda base, folder: make_adapter(base, folder / "adapter", **options)


REFUSED = {
    "another base": (another_base, "a 'lm_head.weight' each"),
    "a full fine-tune": (one_other_value, "a 'model.layers.0.mlp.up_proj.weight' each"),
    "another width": (wider, "the router has no 'lm_head.weight' of shape [300, 48]"),
    "a tied head": (tied, "'lm_head.weight' is tied to the embedding in one of the two"),
    "an embedding": (adapter(target_modules=["embed_tokens"]), "a 'model.embed_tokens.weight' each"),
    "new rows": (adapter(trainable_token_indices=[3]), "a 'model.embed_tokens.weight' each"),
    "a head": (adapter(target_modules=["lm_head"]), "a 'lm_head.weight' each"),
    "a saved matrix": (adapter(**PLAIN, modules_to_save=["up_proj"]), "a 'model.layers.0.mlp.up_proj.weight' each"),
    "DoRA": (adapter(**PLAIN, use_dora=True), "a 'model.layers.0.self_attn.q_proj.weight' each"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_share_is_refused_by_name(name: str, base: Path, tmp_path: Path) -> None:
    make, words = REFUSED[name]
    expert = Checkpoint.open("math", str(make(base, tmp_path)))
    with pytest.raises(InputError) as refusal:
        delta_of(Checkpoint.open("router", str(make_adapter(base, tmp_path / "router", 5, **PLAIN))), expert)
    sentence = str(refusal.value)
    assert sentence.startswith(f"Expert 'math' ({expert.folder}) and the router cannot share one base, since ")
    assert words in sentence and sentence.endswith("leave --shared-base out.") and "\n" not in sentence
