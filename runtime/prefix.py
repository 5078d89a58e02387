"""The prefix cache: prompts that begin alike are read once.

What one session has read of its prompt, others of the runtime copy.

Only tokens that were read several at a time count, and an even number of them. Such passes agree bit for bit however a
text is cut; a single token, or the last of an odd number, may round differently. So no text depends on what happens to
be cached.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol
from weakref import WeakSet

from fusionroute.runtime.backend import Cache

MIN_SHARED_TOKENS = 16  # fewer are not worth a copy


class Lender(Protocol):
    """One session's reader of a model."""

    def offer(self, ids: Sequence[int]) -> int:
        """How many leading tokens of a text it has read, in a form that can be lent."""
        ...

    def lend(self, ids: Sequence[int], cache: Cache) -> None:
        """Copy what `offer` says into another session's cache of the same model."""
        ...


class PrefixCache:
    """The readers of one model in all live sessions of a runtime."""

    def __init__(self) -> None:
        self._lenders: WeakSet[Lender] = WeakSet()
        self._lock = threading.Lock()

    def borrow(self, borrower: Lender, ids: Sequence[int], cache: Cache) -> None:
        """Fill an empty cache with the longest beginning of `ids` that another reader has read.

        From now on the borrower lends too, for as long as its session lives.
        """
        with self._lock:
            lenders = [lender for lender in self._lenders if lender is not borrower]
        self.enrol(borrower)
        length, best = max(((lender.offer(ids), lender) for lender in lenders), key=lambda offer: offer[0], default=(0, None))
        if best is not None and length >= MIN_SHARED_TOKENS:
            best.lend(ids, cache)

    def enrol(self, lender: Lender) -> None:
        """Let a reader lend what it has read and will read."""
        with self._lock:
            self._lenders.add(lender)

    def forget(self) -> None:
        """Lend nothing of what was read up to now: some of it may be wrong."""
        with self._lock:
            self._lenders.clear()
