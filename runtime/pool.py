"""The sessions of a runtime: those in use, and idle ones whose buffers, and what they have read, serve the next text."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING
from weakref import WeakSet

if TYPE_CHECKING:
    from fusionroute.runtime.session import Session

POOLED = 4  # idle sessions that are kept where the prefix cache does not ask for more


class Pool:
    """Idle sessions; `prefixes`: finished texts that are kept for prompts that begin alike, before a session is used again."""

    def __init__(self, prefixes: int):
        self.idle: list[Session] = []
        self._prefixes = prefixes
        self._all: WeakSet[Session] = WeakSet()
        self._open = True
        self._lock = threading.RLock()  # a stream may be collected, and give its session back, while it is held

    def take(self, ids: Sequence[int], make: Callable[[], Session]) -> Session:
        """An idle session: the one whose prompt begins as `ids` do, else the one idle for longest; or a new one."""
        with self._lock:
            alike = [session.alike(ids) for session in self.idle]
            if self.idle and (max(alike) > 0 or len(self.idle) >= self._prefixes):
                return self.idle.pop(alike.index(max(alike)))
        return self.add(make())

    def give(self, session: Session) -> None:
        """The text of a session is over: its buffers wait for another one."""
        with self._lock:
            if self._open and len(self.idle) < max(POOLED, self._prefixes):
                self.idle.append(session)

    def add(self, session: Session) -> Session:
        """Know a session for as long as someone else does."""
        with self._lock:
            self._all.add(session)
        return session

    def sessions(self) -> list[Session]:
        """Those in use and those that wait for another text."""
        with self._lock:
            return list(self._all)

    def close(self) -> None:
        """Keep no session any more."""
        with self._lock:
            self._open = False
            self.idle.clear()
