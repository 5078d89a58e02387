"""Experts' inference sessions within a budget of bytes: opened when first used, the least recently used are closed.

Keys and values are not part of a session. So an expert that comes back goes on where it was, and the text is the same.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from fusionroute.runtime.errors import FusionError
from fusionroute.runtime.expert_memory import check_budget
from fusionroute.runtime.process_memory import release_freed

LOG = logging.getLogger("fusionroute")


class OpenedModel:
    """A model's inference session, and what caches have bound to it, which ends with it. Bindings hold no cache."""

    def __init__(self, session: Any):
        self.session = session
        self.bindings: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

    def close(self) -> None:
        """Free the session, also where somebody still holds this object."""
        self.bindings.clear()  # first: they point into the session
        self.session = None


Lease = Callable[[], AbstractContextManager[OpenedModel]]  # a model's session for the time of one pass


def always(opened: OpenedModel) -> Lease:
    """The lease of a model that stays."""
    return lambda: nullcontext(opened)


class Residency:
    """The experts of one system. `open_expert`: opens one of them by its number; `sizes`: bytes of each.

    Any thread may use any expert. It waits while others use what would have to leave.
    """

    def __init__(self, budget: int, sizes: Sequence[int], open_expert: Callable[[int], OpenedModel]):
        """Raises InputError for a budget that does not hold the largest expert."""
        check_budget(budget, max(sizes))
        self._budget, self._sizes, self._open_expert = budget, sizes, open_expert
        self._changed = threading.Condition()
        self._resident: dict[int, OpenedModel] = {}  # the least recently used first
        self._opening: set[int] = set()
        self._passes = [0] * len(sizes)  # of each expert, that run now
        self._thread = ThreadPoolExecutor(1, "fusionroute-experts")  # starts with its first work

    @property
    def leases(self) -> list[Lease]:
        """How the passes of each expert get its session."""
        return [partial(self._use, expert) for expert in range(len(self._sizes))]

    @contextmanager
    def _use(self, expert: int) -> Iterator[OpenedModel]:
        """The expert, which stays for the time of a pass. Raises what opening it raises; a later pass tries again."""
        opened = self._take(expert)
        try:
            yield opened
        finally:
            with self._changed:
                self._passes[expert] -= 1
                self._changed.notify_all()

    def expect(self, expert: int) -> None:
        """Open an expert that will probably be used next, beside other work.

        For a guess the one that was used last does not leave: it is the likeliest of the others.
        """
        with self._changed:
            latest = next(reversed(self._resident), None)
            if expert in self._resident or self._opening or not self._make_room(expert, spared=(latest,)):
                return
            self._opening.add(expert)
        try:
            self._thread.submit(self._open_early, expert)
        except RuntimeError:  # the interpreter ends
            self._settle(expert, None, 0)

    def _take(self, expert: int) -> OpenedModel:
        """The expert with one pass more."""

        def is_ours() -> bool:
            return expert in self._resident or (expert not in self._opening and self._make_room(expert))

        with self._changed:
            self._changed.wait_for(is_ours)
            if (opened := self._resident.pop(expert, None)) is not None:
                self._resident[expert] = opened
                self._passes[expert] += 1
                return opened
            self._opening.add(expert)
        return self._open(expert, 1)

    def _make_room(self, expert: int, spared: Collection[int | None] = ()) -> bool:
        """Close experts until another one fits, the least recently used first; none where that is not enough.

        The caller holds the lock.
        """
        taken = sum(self._sizes[each] for each in (*self._resident, *self._opening))
        leaving: list[int] = []
        for each in self._resident:
            if taken + self._sizes[expert] <= self._budget:
                break
            if not self._passes[each] and each not in spared:
                leaving.append(each)
                taken -= self._sizes[each]
        if taken + self._sizes[expert] > self._budget:
            return False
        for each in leaving:
            self._resident.pop(each).close()
        return True

    def _open(self, expert: int, passes: int) -> OpenedModel:
        opened = None
        try:
            release_freed()  # what has just left
            opened = self._open_expert(expert)
        finally:
            self._settle(expert, opened, passes)
        return opened

    def _open_early(self, expert: int) -> None:
        with suppress(FusionError):  # the expert meets its error again when it is chosen
            self._open(expert, 0)

    def _settle(self, expert: int, opened: OpenedModel | None, passes: int) -> None:
        """Note that an expert is no longer being opened; `opened` None: that it could not be."""
        with self._changed:
            self._opening.remove(expert)
            if opened is not None:
                self._resident[expert] = opened
                self._passes[expert] += passes
            self._changed.notify_all()
