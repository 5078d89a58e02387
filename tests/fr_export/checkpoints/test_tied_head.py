"""Heads that a config ties: what the weights hold decides, as in transformers 5."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fusionroute.fr_export.checkpoints import tied_head
from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.checkpoints.tied_head import EMBEDDING, HEAD, NOTE
from fusionroute.fr_export.checkpoints.torch_model import torch_model
from tests.support.systems import Shape, make_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model", Shape(layers=1, config={"tie_word_embeddings": True}), 0, expert=False)


def put(folder: Path, head: torch.Tensor | None = None, without: str | None = None) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file) | ({} if head is None else {HEAD: head})
    save_file({name: tensor for name, tensor in tensors.items() if name != without}, file, metadata={"format": "pt"})


def logits(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """What the checkpoint computes as it is exported, and what transformers computes."""
    ids = torch.arange(3, 13)[None]
    ours = torch_model(Checkpoint.open("m", str(folder)), torch.float32, "eager")
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        return ours(ids).logits, theirs(ids).logits


def test_another_head_is_used_and_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tied_head, "SLICE", 1000)  # several pieces
    head = load_file(folder / "model.safetensors")[EMBEDDING].clone()
    tied = logits(folder)[0]
    head[-1, -1] += 1
    put(folder, head)
    checkpoint = Checkpoint.open("m", str(folder))
    assert NOTE in checkpoint.notes and HEAD in checkpoint.weights and not checkpoint.config.tie_word_embeddings
    ours, theirs = logits(folder)
    assert torch.equal(ours, theirs) and not torch.equal(ours, tied)


def test_a_copy_of_the_embedding_is_none(folder: Path) -> None:
    put(folder, load_file(folder / "model.safetensors")[EMBEDDING].clone())
    checkpoint = Checkpoint.open("m", str(folder))
    assert NOTE not in checkpoint.notes and checkpoint.config.tie_word_embeddings
    ours, theirs = logits(folder)
    assert torch.equal(ours, theirs)


def test_a_head_without_an_embedding_is_both(folder: Path) -> None:
    put(folder, load_file(folder / "model.safetensors")[EMBEDDING].clone(), without=EMBEDDING)
    ours, theirs = logits(folder)
    assert torch.equal(ours, theirs)


def test_a_config_that_ties_nothing_is_as_it_was(folder: Path) -> None:
    put(folder, load_file(folder / "model.safetensors")[EMBEDDING] + 1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert NOTE not in Checkpoint.open("m", str(folder)).notes
