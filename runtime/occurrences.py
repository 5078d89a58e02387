"""How often each token stands in a stretch of a text: counts that follow the text as it grows and is cut again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

FIRST_SIZE = 64  # different tokens


class Occurrences:
    """Counts in buffers that are used again: a token costs one look into a dictionary, and allocates nothing."""

    def __init__(self) -> None:
        self._start = 0
        self._tokens: list[int] = []  # the stretch
        self._places: dict[int, int] = {}  # token → its place in the buffers, in order of first occurrence
        self._ids, self._counts = np.zeros(FIRST_SIZE, np.int64), np.zeros(FIRST_SIZE, np.float32)

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """The different tokens, int64 [n]: a view, which `follow` changes."""
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> npt.NDArray[np.float32]:
        """How often each of `ids` occurs, float32 [n]: a view, which `follow` changes."""
        return self._counts[: len(self._places)]

    def follow(self, ids: Sequence[int], start: int, stop: int, unchanged: int) -> None:
        """Count ids[start:stop] from now on. The first `unchanged` of the text's ids are those of the last call."""
        if start != self._start:
            self._start = start
            self._tokens.clear()
            self._places.clear()
        while self._tokens and start + len(self._tokens) > min(stop, unchanged):
            self._drop()
        for token in ids[start + len(self._tokens) : stop]:
            self._add(token)

    def _add(self, token: int) -> None:
        place = self._places.get(token)
        if place is None:
            place = self._places[token] = len(self._places)
            if place == len(self._ids):
                self._ids, self._counts = (np.concatenate([array, np.zeros_like(array)]) for array in (self._ids, self._counts))
            self._ids[place], self._counts[place] = token, 0
        self._counts[place] += 1
        self._tokens.append(token)

    def _drop(self) -> None:
        token = self._tokens.pop()
        place = self._places[token]
        self._counts[place] -= 1
        if not self._counts[place]:  # what occurred first behind it was dropped before: it has the last place
            del self._places[token]
