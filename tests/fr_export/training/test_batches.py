"""Batches: every sample once per epoch, budgets kept, and tensors that say what the rows say."""

import numpy as np
import pytest
import torch

from fusionroute.fr_export.training.batches import Samples, optimizer_steps
from fusionroute.fr_export.training.data import Row


def rows(count: int, seed: int = 0) -> list[Row]:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        length = int(rng.integers(3, 40))
        learnt = rng.random(length) < 0.5
        learnt[[0, -1]] = False, True
        rows.append(Row(rng.integers(1, 99, length).astype(np.int32), learnt))
    return rows


@pytest.mark.parametrize(("size", "tokens"), [(8, None), (8, 128)])
def test_an_epoch_has_every_sample_once(size: int, tokens: int | None) -> None:
    samples = Samples(rows(2100), preferred=False)
    steps = optimizer_steps([samples], size, tokens, per_step=1, epochs=2, max_steps=None, seed=3)
    numbers = [n for (batch,) in steps for n in batch.numbers]
    assert sorted(numbers) == sorted(2 * list(range(2100)))
    assert numbers[:2100] != numbers[2100:]  # shuffled anew
    waste = 0
    for (batch,) in steps:
        lengths = [samples.costs[n] for n in batch.numbers]
        waste += max(lengths) * len(lengths) - sum(lengths)
        assert max(lengths) * len(lengths) <= tokens if tokens else len(lengths) <= size
    assert waste < 0.05 * 2 * sum(samples.costs)


def test_the_same_seed_gives_the_same_plan() -> None:
    samples = Samples(rows(100), preferred=False)

    def numbers(seed: int) -> list[list[int]]:
        return [list(batch.numbers) for step in optimizer_steps([samples], 8, None, 1, 1, None, seed) for batch in step]

    assert numbers(1) == numbers(1) != numbers(2)


@pytest.mark.parametrize("tokens", [None, 60])
def test_a_step_has_the_same_samples_however_it_is_split(tokens: int | None) -> None:
    samples = Samples(rows(100), preferred=False)
    whole = optimizer_steps([samples], 12, tokens and 3 * tokens, per_step=1, epochs=1, max_steps=None, seed=0)
    split = optimizer_steps([samples], 4, tokens, per_step=3, epochs=1, max_steps=None, seed=0)
    assert [sorted(step[0].numbers) for step in whole] == [sorted({n for batch in step for n in batch.numbers}) for step in split]
    few = optimizer_steps([Samples(rows(2), preferred=False)], 4, tokens, per_step=3, epochs=1, max_steps=None, seed=0)
    assert [len(batch.numbers) for batch in few[0]] == [1, 1, 1]


def test_a_step_is_of_one_kind_and_both_kinds_are_shuffled() -> None:
    sft, preferences = Samples(rows(64), preferred=False), Samples(rows(64), preferred=True)
    steps = optimizer_steps([sft, preferences], 4, None, per_step=2, epochs=1, max_steps=None, seed=0)
    kinds = ["".join("p" if batch.samples is preferences else "s" for batch in step) for step in steps]
    assert (kinds.count("ss"), kinds.count("pp"), len(kinds)) == (8, 4, 12)
    assert kinds != sorted(kinds) and kinds != sorted(kinds, reverse=True)
    # epochs repeat until the steps are done
    assert len(optimizer_steps([sft], 4, None, 1, epochs=1, max_steps=50, seed=0)) == 50


@pytest.mark.parametrize("preferred", [False, True])
def test_a_batch_says_what_its_rows_say(preferred: bool) -> None:
    data = rows(10)
    total = sum(len(row.labels) for row in data)
    scores = np.arange(2 * total, dtype=np.float32).reshape(2, total)
    samples = Samples(data, preferred, scores, scores[0] % 3 == 0, scores[1] if preferred else None)
    batch = samples.collate([3, 1])
    order = [6, 2, 7, 3] if preferred else [3, 1]
    starts = np.cumsum([0] + [len(row.labels) for row in data])
    at = 0
    for place, n in enumerate(order):
        row, ids = data[n], batch["ids"][place]
        assert ids[: len(row.ids)].tolist() == row.ids.tolist()
        assert not ids[len(row.ids) :].any()
        for t in range(1, len(row.ids)):
            if row.learnt[t]:
                token = starts[n] + int(row.learnt[1:t].sum())
                assert batch["positions"][at] == place * batch["ids"].shape[1] + t - 1
                assert batch["labels"][at] == row.ids[t]
                assert batch["owners"][at] == place
                assert batch["expert_log_probs"][:, at].tolist() == scores[:, token].tolist()
                assert batch["informative"][at] == (token % 3 == 0)
                assert not preferred or batch["reference"][at] == scores[1, token]
                at += 1
    assert at == len(batch["labels"])
    assert batch["ids"].dtype == batch["positions"].dtype == batch["labels"].dtype == torch.int64
