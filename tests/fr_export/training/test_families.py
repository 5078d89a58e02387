"""Routers of other families are trained beside experts of a third one, whole and by adapters."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.training.recipe import Stage
from fusionroute.fr_export.training.train import train
from tests.fr_export.training.conftest import SHAPE, TEMPLATE, Toy
from tests.support.systems import Shape, make_model, write_tokenizer

STAGES = Stage("sft", 2e-3, 5e-2, max_steps=4), Stage("mixed", 1e-3, 5e-2, max_steps=4)
SHAPES = {
    "qwen2": Shape("qwen2", hidden=32, heads=2, kv_heads=1, vocab=280, layers=2, config={"tie_word_embeddings": True}),
    "qwen3": Shape("qwen3", hidden=32, heads=2, kv_heads=1, head_dim=16, vocab=280, layers=2, config={"attention_bias": True}),
}
LAYERS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.fixture(params=SHAPES)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint with the tokenizer of the toy's experts, which are of family llama3."""
    folder = make_model(tmp_path / "base", SHAPES[request.param], 1, expert=False)
    write_tokenizer(folder, SHAPE.vocab)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_all_weights_are_trained_with_muon(base: Path, toy: Toy, tmp_path: Path) -> None:
    report = train(toy.request(tmp_path / "router", *STAGES, recipe={"optimizer": "muon"}, family=None, router=str(base)))
    assert [stage["steps"] for stage in report.stages] == [4, 4]
    system = System.open(None, str(tmp_path / "router"), toy.experts)
    assert [model.family.name for model in system.models] == [Checkpoint.open("base", str(base)).family.name, "llama3", "llama3"]
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "router/model.safetensors")
    assert before.keys() == after.keys(), "a tied head is written once"
    assert all(not torch.equal(before[name], after[name]) for name in before), "norms, biases and tables too"


def test_adapters_are_put_into_every_layer_and_the_exporter_takes_them(base: Path, toy: Toy, tmp_path: Path) -> None:
    train(toy.request(tmp_path / "router", *STAGES, recipe={"lora_rank": 4}, family=None, router=str(base)))
    adapters = load_file(tmp_path / "router/adapter_model.safetensors")
    assert sorted({name.split(".")[-3] for name in adapters}) == LAYERS
    assert len(adapters) == 2 * len(LAYERS) * 2, "A and B of seven matrices in two layers"
    assert all(tensor.abs().max() > 0 for tensor in adapters.values()), "B began at zero"
    system = System.open(None, str(tmp_path / "router"), toy.experts)
    name = "model.layers.1.self_attn.v_proj"
    a, b = (adapters[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    expected = load_file(base / "model.safetensors")[f"{name}.weight"] + 2 * b @ a  # α is twice the rank
    torch.testing.assert_close(torch.from_numpy(system.router.weights.read(f"{name}.weight")), expected)
