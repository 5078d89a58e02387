"""Ranks from a budget: what is spent, and that no other choice of the same size gains more."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusionroute.fr_export.precision.approximation import Spectrum
from fusionroute.fr_export.precision.rank_budget import RankBudget

GAINS = st.lists(st.floats(1e-6, 1), min_size=1, max_size=4).map(lambda gains: np.array(sorted(gains, reverse=True)))
SPECTRA = st.lists(st.builds(lambda gains, values: (gains, values), GAINS, st.integers(1, 50)), min_size=1, max_size=4)


def spectra(drawn: list[tuple[np.ndarray, int]]) -> list[Spectrum]:
    return [Spectrum((f"m{number}",), gains, values) for number, (gains, values) in enumerate(drawn)]


@given(SPECTRA, st.floats(0.01, 8))
def test_no_choice_of_its_size_gains_more(drawn: list[tuple[np.ndarray, int]], bits: float) -> None:
    every, weights = spectra(drawn), 400
    ranks = RankBudget(bits=bits).spread(every, weights)
    spent = sum(ranks.of[f"m{n}"] * each.values for n, each in enumerate(every))
    assert ranks.bits == pytest.approx(32 * spent / weights) and ranks.bits <= bits
    gained = sum(each.gains[: ranks.of[f"m{n}"]].sum() for n, each in enumerate(every))
    for other in product(*(range(len(each.gains) + 1) for each in every)):
        if sum(rank * each.values for rank, each in zip(other, every, strict=True)) <= spent:
            assert sum(each.gains[:rank].sum() for rank, each in zip(other, every, strict=True)) <= gained + 1e-9
    total = sum(each.gains.sum() for each in every)
    assert ranks.left == pytest.approx(1 - gained / total, abs=1e-9)
    assert ranks.error == pytest.approx((total - gained) / len(every))


@given(SPECTRA, st.integers(1, 6))
def test_one_rank_for_all_ends_where_a_matrix_has_no_more(drawn: list[tuple[np.ndarray, int]], rank: int) -> None:
    every = spectra(drawn)
    assert RankBudget(rank=rank).spread(every, 100).of == {f"m{n}": min(rank, len(each.gains)) for n, each in enumerate(every)}


def test_a_budget_says_how_many_values_it_comes_to() -> None:
    assert RankBudget(bits=0.5).values(6400, 100) == 100
    assert RankBudget(rank=8).values(6400, 100) == 800
