"""What the models of one variant have in common, while several of them are fitted at a time."""

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from fusionroute.fr_export.precision.blockwise import Stored
from fusionroute.fr_export.precision.smoothquant import Choice

SCALES, ALL = "scales", "all"  # what a model settles beside its matrices


class SharedMatrices:
    """Scales and rounded matrices by the content of the matrices: each is stored once, as the first model chose it.

    Models have numbers, in their order. A later one waits where an earlier one has the same matrix, so the outcome does
    not depend on which is faster. Models that are fitted one after the other never wait.
    """

    def __init__(self, contents: Sequence[Collection[str]] = ()):
        """`contents`: the digests of each model's matrices, where several are fitted at a time."""
        self.scales: dict[str, Choice] = {}
        self.stored: dict[str, Stored] = {}
        self._contents = [frozenset(own) for own in contents]
        self._first: dict[str, int] = {}
        for number, own in enumerate(self._contents):
            self._first |= {content: number for content in own if content not in self._first}
        self._settled: set[tuple[int, str]] = set()
        self._changed = threading.Condition()

    @contextmanager
    def scaling(self, number: int) -> Iterator[None]:
        """While a model chooses its scales. Waits for those of earlier models that share a matrix with it."""
        for earlier in range(number if self._contents else 0):
            if self._contents[earlier] & self._contents[number]:
                self._wait(earlier, SCALES)
        yield
        self._settle(number, SCALES)

    def await_matrix(self, number: int, content: str) -> None:
        """Wait until the first model that has a matrix has rounded it, where that is an earlier one."""
        if (first := self._first.get(content, number)) < number:
            self._wait(first, content)

    def settle_matrix(self, number: int, content: str) -> None:
        """A model has rounded a matrix, or taken it over."""
        self._settle(number, content)

    @contextmanager
    def model(self, number: int) -> Iterator[None]:
        """While a model is fitted. Behind it nothing more comes from it, and nobody waits for it, failed or not."""
        try:
            yield
        finally:
            self._settle(number, ALL)

    def _settle(self, number: int, what: str) -> None:
        with self._changed:
            self._settled.add((number, what))
            self._changed.notify_all()

    def _wait(self, number: int, what: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: (number, what) in self._settled or (number, ALL) in self._settled)
