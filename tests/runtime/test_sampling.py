"""Sampling against Hugging Face's logits processors, against frequencies, and against itself with more candidates."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionroute.runtime.errors import InputError
from fusionroute.runtime.sampling import COLDEST, Candidates, Sampler, Sampling

Floats = npt.NDArray[np.float32]


def candidates(row: Floats, count: int, temperature: float, error: float = 0.0) -> Candidates:
    """What a fusion graph would return, its normaliser rounded to float32."""
    order = np.lexsort((np.arange(len(row)), -row))[:count]
    scaled = row.astype(np.float64) / (temperature or 1)
    normaliser = scaled.max() + math.log(np.exp(scaled - scaled.max()).sum())
    return Candidates(order.astype(np.int64), row[order], float(np.float32(normaliser + error)))


def refuse() -> Floats:
    raise AssertionError("the row was asked for although the candidates suffice")


class Draws:
    """In place of a random generator: the draws that a test wants."""

    def __init__(self, *draws: float):
        self.draws = list(draws)

    def random(self) -> float:
        return self.draws.pop(0)


def choose_at(sampling: Sampling, draw: float, given_candidates: Candidates, row: Callable[[], Floats]) -> int:
    sampler = Sampler(sampling)
    sampler.random = Draws(draw)  # type: ignore[assignment]
    return sampler.choose(given_candidates, row)


def hugging_face(row: Floats, sampling: Sampling) -> npt.NDArray[np.float64]:
    """The distribution [V] that `generate` would sample from."""
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers").generation.logits_process
    scores = torch.tensor(row, dtype=torch.float64)[None]
    steps: list[Any] = [processors.TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        steps.append(processors.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(processors.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        steps.append(processors.MinPLogitsWarper(sampling.min_p))
    for step in steps:
        scores = step(None, scores)
    probabilities: npt.NDArray[np.float64] = torch.softmax(scores, -1)[0].numpy()
    return probabilities


GRID = [
    Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for temperature in (0.3, 1.0, 1.7)
    for top_k in (0, 1, 7, 500)
    for top_p in (1.0, 0.9, 0.35)
    for min_p in (0.0, 0.05, 0.6)
]


@pytest.mark.parametrize("count", [1, 12, 80])
def test_kept_tokens_and_probabilities_are_hugging_faces(count: int) -> None:
    row = (np.random.default_rng(3).normal(size=80) * 2).astype(np.float32)
    for sampling in GRID:
        expected = hugging_face(row, sampling)
        order = np.lexsort((np.arange(len(row)), -row))
        edges = np.cumsum(expected[order])
        assert edges[-1] == pytest.approx(1)
        below = 0.0
        for rank in range(int(np.count_nonzero(expected))):
            # Each token fills its stretch of [0, 1), up to 2e-5 at its edges (float32 normaliser).
            if edges[rank] - below > 1e-4:
                for draw in (below + 4e-5, edges[rank] - 4e-5):
                    got = choose_at(sampling, draw, candidates(row, count, sampling.temperature), lambda: row)
                    assert got == order[rank], (sampling, draw, rank)
            below = edges[rank]
        last = choose_at(sampling, 1 - 2**-53, candidates(row, count, sampling.temperature), lambda: row)
        assert expected[last] > 0


rows = st.lists(st.floats(-12, 12, width=16), min_size=1, max_size=60)


@settings(max_examples=400, deadline=None)
@given(
    values=rows,
    share=st.floats(0, 1),
    temperature=st.sampled_from([COLDEST, 0.1, 0.7, 1.0, 2.5, 100.0]),
    top_k=st.integers(0, 70),
    top_p=st.one_of(st.just(1.0), st.floats(1e-6, 1)),
    min_p=st.one_of(st.just(0.0), st.floats(0, 1)),
    seed=st.integers(0, 2**40),
    error=st.sampled_from([0.0, 1e-5, -1e-5, 1e-2, -1e-2]),
)
def test_the_number_of_candidates_changes_nothing(
    values: list[float], share: float, temperature: float, top_k: int, top_p: float, min_p: float, seed: int, error: float
) -> None:
    row = np.array(values, np.float32)
    count = 1 + round(share * (len(row) - 1))
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    few, all_of_them = Sampler(sampling), Sampler(sampling)
    some = candidates(row, count, temperature, error)
    every = candidates(row, len(row), temperature, error)
    for _ in range(20):
        assert few.choose(some, lambda: row) == all_of_them.choose(every, lambda: row)


@pytest.mark.parametrize("count", [1, 40, 256])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0, seed=1),
        Sampling(1.4, top_p=0.97, seed=2),
        Sampling(0.8, top_k=300, top_p=0.9, seed=3),
        Sampling(1.2, min_p=0.001, seed=4),
    ],
)
def test_the_number_of_candidates_changes_nothing_on_a_large_row(count: int, sampling: Sampling) -> None:
    row = np.round(np.random.default_rng(5).normal(size=5000) * 2.5, 1).astype(np.float32)  # rounded: many ties
    few, all_of_them = Sampler(sampling), Sampler(sampling)
    some, every = (candidates(row, size, sampling.temperature) for size in (count, len(row)))
    assert [few.choose(some, lambda: row) for _ in range(200)] == [all_of_them.choose(every, lambda: row) for _ in range(200)]


@pytest.mark.parametrize("scale", [1e7, -1e7, 1e30, 1e38])
@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, top_k=3), Sampling(1.3, top_p=0.8), Sampling(2.0, min_p=0.3)])
def test_where_float32_cannot_hold_the_normaliser_the_row_decides(sampling: Sampling, scale: float) -> None:
    """As behind a repetition penalty of 1e-38."""
    row = (np.array([0.0, 1.0, 0.0, 2.0, 1.0, -9e9]) + (scale if abs(scale) < 1e8 else 0.0)).astype(np.float32)
    row[2] = scale if abs(scale) > 1e8 else row[2]
    expected = np.cumsum(hugging_face(row, sampling)[order := np.lexsort((np.arange(len(row)), -row))])
    for error in (0.0, abs(scale) / 2**23, -abs(scale) / 2**23):
        for draw in np.linspace(0.01, 0.99, 23):
            if np.abs(expected - draw).min() > 1e-3:
                rank = int(np.searchsorted(expected, draw))
                got = [choose_at(sampling, draw, candidates(row, count, sampling.temperature, error), lambda: row) for count in (1, 3, 6)]
                assert got == [order[rank]] * 3, (error, draw)


@pytest.mark.parametrize("error", [0.0, 1e-5, -1e-5])
def test_frequencies_follow_the_softmax(error: float) -> None:
    """Chi-square with 8 degrees of freedom: above 40 once in 300,000 runs; a rounded normaliser must not show."""
    row = np.array([1.0, -1.0, 0.5, 0.5, 2.0, -0.5, 0.0, 1.5, -2.0], np.float32)
    probabilities = np.exp(row.astype(np.float64) / 1.3)
    probabilities /= probabilities.sum()
    sampler = Sampler(Sampling(temperature=1.3, seed=11))
    given_candidates = candidates(row, 4, 1.3, error)
    draws = 40_000
    counts = np.bincount([sampler.choose(given_candidates, lambda: row) for _ in range(draws)], minlength=len(row))
    assert ((counts - draws * probabilities) ** 2 / (draws * probabilities)).sum() < 40


def test_a_normaliser_that_is_too_large_leaves_no_excess_to_one_token() -> None:
    row = np.array([1.0, 1.0, 1.0, 1.0], np.float32)
    too_large = candidates(row, 4, 1.0, error=math.log(2))  # half the draws fall behind all tokens
    got = [choose_at(Sampling(temperature=1.0), draw, too_large, lambda: row) for draw in np.linspace(0.001, 0.999, 4000)]
    assert np.bincount(got, minlength=4) == pytest.approx(1000, abs=5)


def test_the_row_is_read_only_where_the_candidates_do_not_decide() -> None:
    row = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    two = candidates(row, 2, 1.0)
    suffice = [
        (Sampling(temperature=1.0), 0.69),
        (Sampling(temperature=1.0, top_k=2), 0.999),
        (Sampling(temperature=1.0, top_p=0.69), 0.999),
        (Sampling(temperature=1.0, min_p=0.8), 0.999),
        (Sampling(temperature=1.0, top_k=4, min_p=0.8), 0.999),
        (Sampling(temperature=1.0, top_k=2, top_p=0.99), 0.999),
        (Sampling(temperature=1.0, top_p=0.99, min_p=0.8), 0.999),
        (Sampling(), 0.0),
    ]
    for sampling, draw in suffice:
        choose_at(sampling, draw, two, refuse)
    for sampling, draw in [
        (Sampling(temperature=1.0), 0.71),
        (Sampling(temperature=1.0, top_k=3), 0.1),
        (Sampling(temperature=1.0, top_p=0.71), 0.1),
        (Sampling(temperature=1.0, min_p=0.7), 0.1),
        (Sampling(temperature=1.0, top_k=3, top_p=0.5), 0.1),
    ]:
        with pytest.raises(AssertionError, match="was asked for"):
            choose_at(sampling, draw, two, refuse)


def test_ties_go_to_the_lower_id() -> None:
    row = np.array([0.0, -0.0, 3.0, 3.0, -3.0, 3.0], np.float32)
    sampling = Sampling(temperature=1.0, top_k=2)
    got = [choose_at(sampling, draw, candidates(row, 1, 1.0), lambda: row) for draw in (0.0, 0.49, 0.51, 0.99)]
    assert got == [2, 2, 3, 3]
    ranked = [choose_at(Sampling(temperature=100.0), draw, candidates(row, 1, 100.0), lambda: row) for draw in (np.arange(6) + 0.5) / 6]
    assert ranked == [2, 3, 5, 0, 1, 4]


def test_a_draw_on_an_edge_goes_to_the_token_behind_it() -> None:
    row = np.zeros(4, np.float32)
    got = [choose_at(Sampling(temperature=1.0, top_k=4), draw, candidates(row, 4, 1.0), refuse) for draw in (0.0, 0.25, 0.5, 0.75)]
    assert got == [0, 1, 2, 3]


def test_tokens_of_no_probability_are_never_chosen() -> None:
    row = np.array([-np.inf, 1.0, -np.inf, 0.0], np.float32)
    for draw in (0.0, 0.5, 0.9, 1 - 2**-53):
        for sampling in (Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=4), Sampling(temperature=1.0, top_p=0.999)):
            assert choose_at(sampling, draw, candidates(row, 1, 1.0), lambda: row) in (1, 3)


def test_greedy_takes_the_first_candidate_and_draws_nothing() -> None:
    sampler = Sampler(Sampling(seed=1))
    sampler.random = Draws()  # type: ignore[assignment]
    assert sampler.choose(candidates(np.array([1.0, 5.0, 5.0], np.float32), 1, 0), refuse) == 1


def test_a_seed_repeats_and_no_seed_does_not() -> None:
    row = np.zeros(100, np.float32)
    every = candidates(row, 100, 1.0)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed))
        return [sampler.choose(every, lambda: row) for _ in range(30)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)


def test_how_many_candidates_are_wanted() -> None:
    assert Sampler(Sampling()).candidate_count(1000) == 1
    assert Sampler(Sampling(temperature=1.0)).candidate_count(1000) == 256
    assert Sampler(Sampling(temperature=1.0)).candidate_count(100) == 100
    assert Sampler(Sampling(temperature=1.0, top_k=40)).candidate_count(1000) == 40
    assert Sampler(Sampling(temperature=1.0, top_k=4000)).candidate_count(1000) == 1000


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": COLDEST / 2},
        {"temperature": "hot"},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_k": True},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
        {"seed": -1},
        {"seed": 0.5},
    ],
)
def test_values_out_of_range_are_named(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"^{next(iter(values))} is "):
        Sampling(**values)
