"""The draft planner drafts as many tokens as pay, and learns what is accepted without drafting."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.limits import MAX_ROUND_TOKENS
from fusionroute.runtime.speculation.costs import LENGTHS, SIZES, Costs
from fusionroute.runtime.speculation.draft_planner import MIN_SPEEDUP, DraftPlanner
from tests.support.speculation import EVEN, ONE, SHORT

THREE = tuple(tuple(3 * seconds for seconds in passes) for passes in ONE)
LINEAR = ((1.0, 2.0, 4.0, 8.0),) * 2
LARGE = Costs(router=ONE, experts=(THREE, THREE, THREE), fusion=0.05)  # type: ignore[arg-type]


def speed(known: Costs, source: str, rows: int, rate: float, switches: float, length: int) -> float:
    """Tokens per second of rounds of so many rows, written out anew."""
    at = [int(np.clip(length, *LENGTHS)) for _ in SIZES]
    router, expert = (
        np.interp(range(1, rows + 1), SIZES, [np.interp(n, LENGTHS, ends) for n, ends in zip(at, zip(*passes, strict=True), strict=True)])
        for passes in (known.router, known.experts[1])
    )
    tokens = sum(rate**n for n in range(rows))
    drafting = rows * router[0] if source == "router" else router[-1]
    return float(tokens / (drafting + expert[-1] + switches * (tokens - 1) * expert[0] + tokens * known.fusion))


@pytest.mark.parametrize("known", [EVEN, LARGE], ids=["even", "large"])
@pytest.mark.parametrize("rate", [0.2, 0.6, 0.9])
@pytest.mark.parametrize("length", [5, 500, 5000])
def test_drafts_are_as_many_as_pay(known: Costs, rate: float, length: int) -> None:
    planner, random = DraftPlanner(known), np.random.default_rng(0)
    planner.produced(1000, 0, False)
    for _ in range(400):
        for source, share in (("router", rate), ("lookup", rate / 2)):
            hits = random.random(3) < share
            planner.saw(source, int(np.argmin([*hits, False])), 3)
    choices = [("router", rows) for rows in range(1, MAX_ROUND_TOKENS + 1)] + [("lookup", rows) for rows in range(2, 6)]
    speeds = {
        (source, rows): speed(known, source, rows, planner.rates[source].mean, planner.switches.mean, length) for source, rows in choices
    }
    speeds["router", 1] *= MIN_SPEEDUP
    plan = planner.plan(MAX_ROUND_TOKENS, 4, True, 1, length)
    assert (plan.source, plan.rows) == max(speeds, key=speeds.__getitem__)


@pytest.mark.parametrize("rate", [0.1, 0.95])
@pytest.mark.parametrize("switches", [0.0, 0.4])
def test_passes_of_both_are_priced_by_what_they_take(rate: float, switches: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all plans the one with the most tokens per second, by sums written out anew."""
    reading, verifying, alone = [1.2, 1.4, 1.8, 2.6], [1.2, 1.3, 1.5, 2.0], [1.1, 1.3, 1.5, 2.1]
    known = Costs((tuple(alone),) * 2, ((tuple(alone),) * 2,) * 3, 0.05, joint=((tuple(reading),) * 2, (tuple(verifying),) * 2))
    planner = DraftPlanner(known)
    planner.produced(10000, round(10000 * switches), False)
    planner.misses.hits, planner.misses.trials = 1000 * switches / 2, 1000.0
    for source in ("lookup", "router"):
        planner.rates[source].hits, planner.rates[source].trials = 1000 * rate, 1000.0
    share = planner.switches.mean
    together, last = (np.interp(range(1, MAX_ROUND_TOKENS + 1), SIZES, seconds) for seconds in (reading, verifying))
    wrong = planner.misses.mean * alone[0]
    speeds = {("router", 1): MIN_SPEEDUP / (reading[0] + wrong + 0.05)}
    for rows in range(2, MAX_ROUND_TOKENS + 1):
        tokens = sum(rate**n for n in range(rows))
        turns = wrong + share * alone[0] * (tokens - 1)  # a guess that is wrong, and experts that take turns
        speeds["lookup", rows] = tokens / (together[rows - 1] + turns + 0.05 * tokens)
        speeds["router", rows] = tokens / ((rows - 1) * alone[0] + last[rows - 1] + turns + 0.05 * tokens)
    plan = planner.plan(MAX_ROUND_TOKENS, MAX_ROUND_TOKENS, True, 1, 32)
    assert (plan.source, plan.rows) == max(speeds, key=speeds.__getitem__)
    assert (plan.rows > 1) == (rate > 0.5)
    monkeypatch.setattr(SHORT, 1e-3)
    assert planner.pays and not DraftPlanner(replace(known, joint=(((1e-4,) * 4,) * 2,) * 2)).pays


def test_models_that_run_side_by_side_leave_less_to_gain() -> None:
    planner = DraftPlanner(replace(EVEN, concurrent=True))
    for _ in range(100):
        planner.saw("lookup", 3, 3)
        planner.saw("router", 3, 3)
    planner.produced(1000, 0, False)
    assert DraftPlanner(EVEN, rates=planner.rates, switches=planner.switches).plan(MAX_ROUND_TOKENS, 0, True, 1, 32).rows > 1
    assert planner.plan(MAX_ROUND_TOKENS, 0, True, 1, 32).rows == 1, "a router step per draft costs what a plain token does"
    assert planner.plan(MAX_ROUND_TOKENS, 7, True, 1, 32).rows == MAX_ROUND_TOKENS


def test_acceptance_is_learnt_without_drafting(bundles: list[Path]) -> None:
    """Rates are those of a recount of the same text, though nothing was drafted; drafting begins once it pays."""
    with FusionRuntime.load(bundles[0], device="cpu", precision="fp32", speculation="auto") as rt:
        costs = Costs(LINEAR, (LINEAR,) * len(rt.expert_names), 0.1)
        rt._sets.current = replace(rt._sets.current, costs=costs)  # several cost what they cost one by one
        kinds: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 1}]
        for options in kinds:
            session = rt.session()
            session.append([7, 9, 30, 7, 9])
            tokens = [session.steps(8, **options)[0] for _ in range(100)]
            assert session.drafted == 0 and session._decoder.rounds is not None
            planner = session._decoder.rounds.planner
            own = rt.score(session.token_ids, lam=1.0).logits[4:-1].astype(np.float64)
            ids = [token.id for token in tokens]
            q = np.exp(own - own.max(-1, keepdims=True))
            q = (q / q.sum(-1, keepdims=True))[range(100), ids]
            seen = np.minimum(1, q / np.exp([token.logprob for token in tokens])) if options else own.argmax(-1) == ids
            weights = 0.97 ** np.arange(100)[::-1]
            expected = (seen @ weights + 0.5 * 0.97**100) / (weights.sum() + 0.97**100)
            assert planner.rates["router"].mean == pytest.approx(expected, abs=1e-3)
            planner.costs = replace(EVEN, router=((0.01,) * 4,) * 2, experts=(((1.0,) * 4,) * 2,) * 2)
            planner._priced = (-1, False, None)
            assert len(session.steps(8)) >= 1 and session.drafted > 0


def test_steps_of_less_than_a_millisecond_are_left_alone(bundles: list[Path], eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SHORT, 1e-3)
    for seconds, drafts in ((4e-4, False), (6e-4, True)):
        known = ((seconds,) * 4,) * 2
        monkeypatch.setattr("fusionroute.runtime.speculation.costs.costs_of", lambda *_, known=known: Costs(known, (known,) * 2, 1e-5))
        with FusionRuntime.load(bundles[0], device="cpu", precision="fp32", speculation="auto") as rt:
            assert (rt.generate([7, 9, 30, 7, 9], 20).drafted > 0) == drafts
