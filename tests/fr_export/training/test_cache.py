"""Experts' log-probabilities: right, kept, and computed again when anything they depend on changes."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.training import expert_cache
from fusionroute.fr_export.training.data import read_sft
from fusionroute.fr_export.training.expert_cache import (
    Scores,
    cache_key,
    data_digest,
    expert_scores,
    informative,
    model_digest,
    read_scores,
)
from fusionroute.fr_export.training.router import load_lm
from tests.fr_export.training.conftest import Toy
from tests.support.systems import Shape, make_model, write_tokenizer

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_a_direct_computation(family: str, toy: Toy, tmp_path: Path) -> None:
    folder = make_model(
        tmp_path / "expert", Shape(family, vocab=288, config={"final_logit_softcapping": 3.0} if family == "gemma2" else {}), 5, True
    )
    write_tokenizer(folder, 288)
    rows = read_sft(toy.sft, toy.encoder)[::9]
    vocab = 280  # the embedding is padded beyond it
    done: list[float] = []
    with patch.object(expert_cache, "_TOKENS", 64):
        scores = expert_scores(Checkpoint.open("e", str(folder), FAMILIES[family]), rows, vocab, "fp32", CPU, tmp_path / "s", done.append)
    assert sum(done) == len(rows)
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    log_probs, argmaxes = [], []
    for row in rows:
        with torch.no_grad():
            logits = lm(torch.tensor(row.ids[None].astype(np.int64))).logits[0, :-1, :vocab]
        for t in range(len(row.ids) - 1):
            if row.learnt[t + 1]:
                log_probs.append(float(logits[t].log_softmax(-1)[row.ids[t + 1]]))
                argmaxes.append(int(logits[t].argmax()))
    assert scores.log_probs == pytest.approx(log_probs, abs=2e-5)
    assert scores.argmaxes.tolist() == argmaxes


def test_informative_tokens_are_those_where_experts_disagree() -> None:
    zeros = np.zeros(4, np.float32)
    experts = [Scores(zeros, np.array(best, np.int32)) for best in ([1, 2, 3, 4], [1, 2, 5, 4], [1, 6, 5, 4])]
    assert informative(experts).tolist() == [False, True, True, False]
    assert not informative(experts[:1]).any()


def test_scores_are_computed_once_and_again_when_something_changed(toy: Toy, tmp_path: Path) -> None:
    folder = tmp_path / "expert"
    shutil.copytree(toy.experts["letters"], folder)
    rows = read_sft(toy.sft, toy.encoder)[:5]

    def computed(change: Callable[[], object] = lambda: None) -> bool:
        """Whether a model had to run."""
        change()
        checkpoint = Checkpoint.open("letters", str(folder), FAMILIES["llama3"])
        file = tmp_path / cache_key(model_digest(checkpoint), data_digest(rows), 280, "fp32")
        with patch.object(expert_cache, "load_lm", wraps=load_lm) as load:
            scores = expert_scores(checkpoint, rows, 280, "fp32", CPU, file, lambda _: None)
        assert read_scores(file).log_probs.tolist() == scores.log_probs.tolist()  # type: ignore[union-attr]
        return bool(load.called)

    def other_answer() -> None:
        rows[1] = replace(rows[1], learnt=np.roll(rows[1].learnt, 1))

    assert computed() and not computed()
    assert computed(lambda: shutil.copyfile(Path(toy.experts["digits"]) / "model.safetensors", folder / "model.safetensors"))
    assert not computed()
    assert computed(other_answer)
    assert computed(lambda: rows.reverse())
    assert not computed(lambda: (folder / "generation_config.json").write_text("{}"))


def test_a_broken_file_is_computed_again(toy: Toy, tmp_path: Path) -> None:
    rows = read_sft(toy.sft, toy.encoder)[:5]
    checkpoint = Checkpoint.open("letters", toy.experts["letters"], FAMILIES["llama3"])
    file = tmp_path / "scores.safetensors"
    whole = expert_scores(checkpoint, rows, 280, "fp32", CPU, file, lambda _: None)
    file.write_bytes(file.read_bytes()[:-7])
    again = expert_scores(checkpoint, rows, 280, "fp32", CPU, file, lambda _: None)
    assert again.log_probs.tolist() == whole.log_probs.tolist()
    assert list(tmp_path.iterdir()) == [file]
