"""Drafts looked up in the text: those that a search finds, for the work of reading the text once."""

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionroute.runtime.speculation.lookup import MAX_NGRAM, MIN_NGRAM, Lookup


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 7))
def test_lookup_finds_what_a_search_finds(text: list[int], most: int) -> None:
    lookup = Lookup()
    for end in range(1, len(text) + 1):
        now = text[:end]
        expected: list[int] = []
        for size in range(min(MAX_NGRAM, end), MIN_NGRAM - 1, -1):
            starts = [at + size for at in range(end - size) if now[at : at + size] == now[end - size :]]
            if starts:
                whole = now[starts[-1] :]
                expected = [whole[n % len(whole)] for n in range(most)]
                break
        assert lookup.propose(now, most) == expected


class Counted(list[int]):
    """Token ids that count how often they are read."""

    reads = 0

    def __getitem__(self, place: Any) -> Any:
        Counted.reads += 1
        return super().__getitem__(place)


def test_lookup_reads_a_text_once_however_often_it_is_asked() -> None:
    lookup, tokens, most = Lookup(), Counted(), 7
    Counted.reads = 0
    for token in np.random.default_rng(0).integers(0, 4, 2000).tolist():
        tokens.append(token)
        lookup.propose(tokens, most)
    sizes = MAX_NGRAM - MIN_NGRAM + 1
    assert Counted.reads <= len(tokens) * (2 * sizes + most), "n-grams of one new token, the search for the last ones, the drafts"
