"""Sampled drafts: what is drawn, and that verified tokens have the distribution of plain sampling."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.sampling import DEFAULT_CANDIDATES, Sampler, Sampling
from fusionroute.runtime.speculation.draft_planner import DraftPlan, DraftPlanner
from fusionroute.runtime.speculation.rejection import Distribution, Softmax, certain, verify
from fusionroute.runtime.speculation.rounds import DRAFT_MARGIN, proposal

RARE = 0.004  # pairs of tokens below are counted together


@pytest.mark.parametrize(
    ("source", "options"),
    [
        pytest.param("router", {"temperature": 1.5, "top_k": 4}, id="router-filtered"),
        pytest.param("router", {"temperature": 0.2}, id="router-unfiltered"),
        pytest.param("lookup", {"temperature": 1.5, "top_k": 4}, id="lookup-filtered"),
        pytest.param("lookup", {"temperature": 0.2}, id="lookup-unfiltered", marks=pytest.mark.slow),
    ],
)
def test_samples_have_the_distribution_of_plain_sampling(
    bundles: list[Path], monkeypatch: pytest.MonkeyPatch, source: str, options: dict[str, Any]
) -> None:
    """Two tokens together against their enumeration. The same test refuses a sampler that skips the residual."""
    monkeypatch.setattr(
        DraftPlanner, "plan", lambda self, most, looked_up, *_: DraftPlan(source, min(most, 2, looked_up + 1 if source == "lookup" else 2))
    )
    assert distance(bundles[0], verify, source, options) < 1.0
    assert distance(bundles[0], careless, source, options) > 2.0


def careless(p: Distribution | Softmax, q: Distribution, draft: int, random: np.random.Generator) -> int:
    """Verification that draws a refused token anew from p instead of from what is left of p."""
    if random.random() * q.probabilities_of(np.array([draft]))[0] < p.probabilities_of(np.array([draft]))[0]:
        return draft
    return p.draw(random.random())


def distance(folder: Path, check: Any, source: str, options: dict[str, Any]) -> float:
    """χ² of pairs of sampled tokens against their enumerated probabilities, over its 99.9 % quantile.

    Rare pairs are taken together.
    """
    draws = 700 if "top_k" in options else 1500
    with pytest.MonkeyPatch.context() as patch, FusionRuntime.load(folder, device="cpu", precision="fp32", speculation="auto") as rt:
        patch.setattr("fusionroute.runtime.speculation.rounds.verify", check)

        def following(text: list[int]) -> dict[int, float]:
            row = rt.score(text, positions=[len(text) - 1]).logits[0].astype(np.float64) / options["temperature"]
            top = np.argsort(-row, kind="stable")[: options.get("top_k")]
            weights = np.exp(row[top] - row[top[0]])
            return dict(zip(top.tolist(), (weights / weights.sum()).tolist(), strict=True))

        ids = [7, 9, 30, 7, 9]
        if source == "lookup":  # what is looked up must be neither sure nor refused
            repeated = ([7, 9, token, 7, 9] for token in range(3, rt.vocab_size))
            ids = next(ids for ids in repeated if 0.2 < following(ids).get(ids[2], 0) < 0.8)
        likely = {a: p for a, p in following(ids).items() if p > RARE}
        expected = {(a, b): p * q for a, p in likely.items() for b, q in following([*ids, a]).items() if p * q > RARE}
        seen = Counter(tuple(rt.generate(ids, 2, seed=seed, **options).token_ids) for seed in range(draws))
    bins = [(seen.pop(pair, 0), draws * p) for pair, p in expected.items()]
    rest = 1 - sum(expected.values())
    assert rest > RARE or not seen
    if rest > RARE:
        bins.append((sum(seen.values()), draws * rest))
    chi_square, free = float(sum((count - mean) ** 2 / mean for count, mean in bins)), len(bins) - 1
    # 99.9 %, Wilson and Hilferty 1931
    quantile: float = free * (1 - 2 / (9 * free) + 3.09 * (2 / (9 * free)) ** 0.5) ** 3
    return chi_square / quantile


@given(st.integers(2, 6), st.booleans(), st.booleans(), st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_verified_tokens_are_distributed_as_the_target(size: int, sparse: bool, sure: bool, seed: int) -> None:
    random = np.random.default_rng(seed)
    p, q = random.dirichlet(np.ones(size), 2)
    ids = random.permutation(size).astype(np.int64) if sparse else None
    target = Softmax(np.log(p).astype(np.float32) / 2, 0.5, 0.0) if ids is None else Distribution(ids, p[ids])
    proposal = certain(int(random.integers(size))) if sure else Distribution(np.arange(size), q)
    drawn = Counter(verify(target, proposal, proposal.draw(random.random()), random) for _ in range(4000))
    assert np.abs(np.array([drawn[token] for token in range(size)]) / 4000 - p).max() < 0.04


@given(st.integers(1, 2000), st.sampled_from([0.1, 0.7, 1.0, 5.0]), st.sampled_from([{}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.2}]))
@settings(max_examples=40, deadline=None)
def test_drafts_are_drawn_from_the_likeliest_tokens(vocab: int, temperature: float, filters: dict[str, Any]) -> None:
    row = (4 * np.random.default_rng(vocab).standard_normal(vocab)).astype(np.float32).round(1)  # with equal ones
    drafts = proposal(Sampler(Sampling(temperature, **filters)), row, row.max())
    scaled = row.astype(np.float64) / temperature
    order = np.lexsort((np.arange(vocab), -scaled))
    near = order[scaled[order] > scaled.max() - DRAFT_MARGIN + 1e-4]
    if len(near) <= DEFAULT_CANDIDATES and not filters:
        assert set(near) <= set(drafts.ids.tolist())
    assert (
        len(drafts.ids) <= min(DEFAULT_CANDIDATES, filters.get("top_k", DEFAULT_CANDIDATES))
        and (scaled[drafts.ids] > scaled.max() - DRAFT_MARGIN - 1e-4).all()
    )
    # the first so many, or others equal to the last
    assert np.array_equal(scaled[drafts.ids], scaled[order[: len(drafts.ids)]])
    weights = np.exp(scaled[drafts.ids] - scaled.max())
    assert drafts.probabilities == pytest.approx(weights / weights.sum())
    everything = np.exp(scaled[order[:DEFAULT_CANDIDATES]] - scaled.max())
    everything = everything[everything >= np.exp(-DRAFT_MARGIN - 1e-4)]
    shares = np.cumsum(everything) / everything.sum()
    if "top_p" in filters and temperature < 5:
        assert len(drafts.ids) == np.searchsorted(shares, 0.6) + 1
    if "min_p" in filters:
        assert (weights >= 0.2 * (1 - 1e-6)).all()


def test_where_float32_cannot_hold_the_normaliser_probabilities_are_summed() -> None:
    row = np.array([0.0, 4.0, 8.0, 4.0], np.float32) + np.float32(1e7)
    expected = np.exp(np.array([-8.0, -4.0, 0.0, -4.0]))
    wrong = Softmax(row, 1.0, 1e7)  # 8 less than it is, and float32 holds every number between
    assert wrong.probabilities_of(np.array([3, 2])) == pytest.approx(expected[[3, 2]] / expected.sum())
