"""What a step changes: the losses of a whole batch against plain loops, and who learns from what."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.training.batches import Samples, flat
from fusionroute.fr_export.training.data import read_preferences, read_sft
from fusionroute.fr_export.training.recipe import Recipe, Stage
from fusionroute.fr_export.training.router import Router, start_head
from fusionroute.fr_export.training.trainer import RouterTrainer
from tests.fr_export.training.conftest import Toy

BETA, WEIGHT = 0.3, 0.7


def samples(toy: Toy, preferred: bool, count: int) -> Samples:
    """Rows of the toy with made-up words of two experts and a made-up reference."""
    rows = flat(read_preferences(toy.preferences, toy.encoder)[:count]) if preferred else read_sft(toy.sft, toy.encoder)[:: 256 // count]
    total = sum(len(row.labels) for row in rows)
    rng = np.random.default_rng(0)
    words = -3 * rng.random((2, total), np.float32)
    return Samples(rows, preferred, words, rng.random(total) < 0.5, -rng.random(total, np.float32) if preferred else None)


def router(toy: Toy) -> Router:
    """The base with a head that prefers now one expert, now the other."""
    checkpoint = Checkpoint.open("router", toy.base, FAMILIES["llama3"])
    start = start_head(checkpoint, list(toy.experts))
    assert start is not None and start.shape == (2, 32) and not start.any()
    torch.manual_seed(1)
    return Router.load(checkpoint, torch.randn(2, 32), 280)


def trainer(model: Router, stage: str, sets: list[Samples], folder: Path, steps: int | None = 1, **recipe: Any) -> RouterTrainer:
    """Of one step, or (steps=None) of one epoch."""
    fields: dict[str, Any] = {"batch_size": 4, "beta": BETA, "routing_weight": WEIGHT, "optimizer": "muon"} | recipe
    return RouterTrainer(model, Stage(stage, 1e-2, max_steps=steps), Recipe((Stage(stage),), **fields), sets, folder, None)


def everywhere(model: Router, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [S, V] and routing scores [S, n] of one row, in the plainest way."""
    out = model.lm(ids[None], output_hidden_states=True)
    assert model.head is not None
    return out.logits[0].log_softmax(-1), out.hidden_states[-1][0] @ model.head.weight.T


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_sft_loss_and_gradient_of_a_batch_equal_plain_loops(toy: Toy, tmp_path: Path, optimizer: str) -> None:
    data, model = samples(toy, False, 4), router(toy)
    own = trainer(model, "sft", [data], tmp_path, optimizer=optimizer)
    batch = data.collate(range(4))
    loss = own.compute_loss(model, batch, num_items_in_batch=(len(batch["labels"]), int(batch["informative"].sum())))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    assert data.expert_log_probs is not None and data.informative is not None
    lm, mixtures, at = [], [], 0
    for row in data.rows:
        log_probs, routing = everywhere(model, torch.from_numpy(row.ids.astype(np.int64)))
        for t in range(1, len(row.ids)):
            if row.learnt[t]:
                lm.append(log_probs[t - 1, int(row.ids[t])])
                if data.informative[at]:
                    mixtures.append(
                        sum(w * float(x) for w, x in zip(routing[t - 1].softmax(-1), data.expert_log_probs[:, at], strict=True))
                    )
                at += 1
    expected = -sum(lm) / len(lm) - WEIGHT * sum(mixtures) / len(mixtures)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-3, atol=1e-5)


def test_cdpo_loss_of_a_batch_equals_plain_loops_and_spares_the_head(toy: Toy, tmp_path: Path) -> None:
    data, model = samples(toy, True, 5), router(toy)
    own = trainer(model, "mixed", [data], tmp_path)
    loss = own.compute_loss(model, data.collate(range(5)), num_items_in_batch=(5, 0))
    loss.backward()
    assert model.head is not None and model.head.weight.grad is None
    gradients = {name: p.grad.clone() for name, p in model.lm.named_parameters()}
    model.zero_grad()
    assert data.expert_log_probs is not None and data.reference is not None
    sums: list[Any] = []
    chosen_experts = set()
    at = 0
    for row in data.rows:
        log_probs, routing = everywhere(model, torch.from_numpy(row.ids.astype(np.int64)))
        total: Any = 0.0
        for t in range(1, len(row.ids)):
            if row.learnt[t]:
                expert = int(routing[t - 1].argmax())
                chosen_experts.add(expert)
                bias = float(data.expert_log_probs[expert, at])
                total = total + BETA * (log_probs[t - 1, int(row.ids[t])] - float(data.reference[at])) + BETA * bias
                at += 1
        sums.append(total)
    assert chosen_experts == {0, 1}
    expected = sum(torch.log(1 + torch.exp(-(chosen - rejected))) for chosen, rejected in zip(sums[::2], sums[1::2], strict=True)) / 5
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    expected.backward()
    for name, p in model.lm.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-3, atol=1e-5)


def test_without_experts_preferences_give_the_loss_of_dpo(toy: Toy, tmp_path: Path) -> None:
    data = replace(samples(toy, True, 1), expert_log_probs=None, informative=None)
    model = router(toy)
    model.head = None
    loss = trainer(model, "cdpo", [data], tmp_path).compute_loss(model, data.collate([0]), num_items_in_batch=(1, 0))
    with torch.no_grad():
        sums = [
            float(model.lm(torch.tensor(row.ids[None].astype(np.int64))).logits[0].log_softmax(-1)[row.positions, row.labels].sum())
            for row in data.rows
        ]
    assert data.reference is not None
    cut = len(data.rows[0].labels)
    gap = (sums[0] - data.reference[:cut].sum()) - (sums[1] - data.reference[cut:].sum())
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-BETA * gap)), rel=1e-4)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_preferences_move_the_backbone_and_samples_the_head_too(toy: Toy, tmp_path: Path, optimizer: str) -> None:
    sets = {"sft": samples(toy, False, 4), "preferences": samples(toy, True, 4)}
    for kind, moved in (("sft", True), ("preferences", False)):
        model = router(toy)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer(model, "mixed", [sets[kind]], tmp_path, optimizer=optimizer).run(None, lambda _: None)
        changed = {name: not torch.equal(before[name], p) for name, p in model.named_parameters()}
        assert changed.pop("head.weight") is moved
        assert all(changed.values())


def test_in_a_mixed_run_momentum_and_decay_do_not_move_the_head_on_preferences(toy: Toy, tmp_path: Path) -> None:
    model = router(toy)
    own = trainer(model, "mixed", [samples(toy, False, 16), samples(toy, True, 16)], tmp_path, steps=None, seed=1)
    heads: list[Tensor] = []
    assert model.head is not None
    head = model.head.weight
    own.run(None, lambda _: heads.append(head.detach().clone()))
    kinds = ["p" if step[0].samples.preferred else "s" for step in own.steps]
    moved = ["s" if not torch.equal(a, b) else "p" for a, b in zip([router(toy).head.weight, *heads], heads, strict=False)]  # type: ignore[union-attr]
    assert len(moved) == 8 and "sp" in "".join(kinds)
    assert moved == kinds


@pytest.mark.parametrize("preferred", [False, True])
def test_accumulated_batches_equal_one_batch(toy: Toy, tmp_path: Path, preferred: bool) -> None:
    data = samples(toy, preferred, 8)
    results, curves = [], []
    for size, accumulation in ((8, 1), (2, 4)):
        model = router(toy)
        own = trainer(model, "mixed", [data], tmp_path, batch_size=size, accumulation=accumulation)
        own.run(None, lambda _: None)
        results.append(model.state_dict())
        curves.append(own.points())
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-4, atol=1e-5)
    assert curves[1] == [pytest.approx(point, rel=1e-4) for point in curves[0]]
