"""The bound on keys and values: what all texts of a runtime may take together, those that it keeps included."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Protocol
from weakref import WeakSet

from fusionroute.runtime.errors import UnavailableError


class Holder(Protocol):
    """A model's cache in one text. `kv_bytes`: what it has taken, until it is dropped."""

    kv_bytes: int


class IdleTexts(Protocol):
    """The finished texts that are kept."""

    def drop_oldest(self) -> bool:
        """Forget the one that has been idle for longest; whether there was one."""
        ...


class KvMemory:
    """What the caches of a runtime have taken. `limit`: bytes of all together; None: none."""

    def __init__(self, limit: int | None):
        self._limit = limit
        self._holders: WeakSet[Holder] = WeakSet()  # of texts that somebody still has
        self._lock = threading.RLock()  # a cache that goes may belong to a stream, which is then collected too
        self._idle: Callable[[], IdleTexts | None] = lambda: None

    def give_back_from(self, idle: IdleTexts) -> None:
        """Let these texts go, the oldest first, where others need their room. Held weakly: they hold caches, and those this."""
        self._idle = weakref.ref(idle)

    @property
    def taken(self) -> int:
        """Bytes that caches have taken."""
        with self._lock:
            return sum(holder.kv_bytes for holder in self._holders)

    def grow(self, holder: Holder, size: int) -> None:
        """Let a cache take `size` bytes, with what it has. Idle texts make room.

        Raises UnavailableError where other texts hold too much: it has what it had then.
        """
        with self._lock:
            self._holders.add(holder)
            while self._limit is not None and (beside := self.taken - holder.kv_bytes) + size > self._limit:
                idle = self._idle()
                if idle is None or not idle.drop_oldest():
                    raise UnavailableError(
                        f"{size / 1e6:,.1f} MB of keys and values are needed and {max(self._limit - beside, 0) / 1e6:,.1f} MB are free of the "
                        f"{self._limit / 1e6:,.1f} MB of kv_memory: end other texts, shorten this one, or allow more."
                    )
            holder.kv_bytes = size
