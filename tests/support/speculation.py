"""Costs that a test can count on, drafting at random, and prompts compared with plain decoding. Needs no torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.limits import MAX_ROUND_TOKENS
from fusionroute.runtime.speculation.costs import Costs
from fusionroute.runtime.speculation.draft_planner import DraftPlan, DraftPlanner

ONE = ((1.0, 1.1, 1.3, 1.9), (1.1, 1.3, 1.7, 2.7))  # short and long texts
SHORT = "fusionroute.runtime.speculation.draft_planner.MIN_STEP_SECONDS"
EVEN = Costs(router=ONE, experts=(ONE, ONE, ONE), fusion=0.05)  # as models of one size on a CPU


def draft_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft as often as the text allows, at random from both sources, whether it pays or not."""
    random = np.random.default_rng(0)

    def plan(
        self: DraftPlanner, most: int, looked_up: int, router: bool, expert: int | None, length: int, plain: float | None = None
    ) -> DraftPlan:
        if looked_up and most > 1 and random.random() < 0.5:
            return DraftPlan("lookup", int(random.integers(2, min(looked_up + 1, most) + 1)))
        return DraftPlan("router", int(random.integers(1, min(MAX_ROUND_TOKENS, most) + 1)) if router and expert is not None else 1)

    monkeypatch.setattr(DraftPlanner, "plan", plan)
    monkeypatch.setattr(SHORT, 0.0)


def prompts(count: int, vocab: int, seed: int = 0) -> Iterator[list[int]]:
    """Random token ids, half of them with a part that stands twice, so that something can be looked up."""
    random = np.random.default_rng(seed)
    for number in range(count):
        ids = random.integers(3, vocab, random.integers(1, 40)).tolist()
        yield ids + ids[: len(ids) // 2] if number % 2 else ids


def same(folder: Path, precision: str, count: int, exact: bool, **options: Any) -> int:
    """Compare `count` prompts; how many tokens were drafted."""
    drafted = 0
    settings: dict[str, Any] = {"precision": precision, "device": "cpu", "exact": exact}
    with FusionRuntime.load(folder, **settings) as plain, FusionRuntime.load(folder, speculation="auto", **settings) as guessing:
        for ids in prompts(count, plain.vocab_size):
            expected, result = plain.generate(ids, 24, **options), guessing.generate(ids, 24, **options)
            assert (result.token_ids, result.experts) == (expected.token_ids, expected.experts)
            assert result.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
            assert expected.drafted == 0 and 0 <= result.accepted <= result.drafted
            drafted += result.drafted
    return drafted
