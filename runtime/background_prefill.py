"""Background catch-up: experts that are not chosen read the text behind the others' backs, so that waking one of them costs a short pause.

An expert reads up to multiples of PIECE, whether it does so here or when it is chosen: what comes out depends on the tokens, never on the clock.
"""

from __future__ import annotations

import threading
from concurrent.futures import Executor, Future
from contextlib import suppress
from typing import TYPE_CHECKING

from fusionroute.runtime.errors import FusionError
from fusionroute.runtime.limits import boundary

if TYPE_CHECKING:
    from fusionroute.runtime.session import Session

MODES = ("lazy", "background")


class CatchUp:
    """The reading of one session's experts, in a thread that all sessions of a runtime share.

    `thread` None: passes are only queued on the device, so the caller queues them, one a step.
    """

    def __init__(self, session: Session, thread: Executor | None):
        self._session, self._thread = session, thread
        self._lock = threading.Lock()
        self._under_way: dict[int, Future[None]] = {}
        self._limit = 0

    def go_on(self, committed: int) -> None:
        """Let experts read what is due among so many tokens, which stay as they are until `wait` or `settle`."""
        self._limit = committed - 2  # the newest token is read where it is answered, and not alone
        if self._thread is None:
            expert = min(range(len(self._session.names)), key=self._session.reached)
            if self._due(expert):
                self._session.read_piece(expert, self._limit)
            return
        for expert in range(len(self._session.names)):
            with self._lock:
                if expert not in self._under_way:
                    self._submit(expert)

    def _due(self, expert: int) -> bool:
        return boundary(self._session.reached(expert)) <= self._limit

    def _submit(self, expert: int) -> None:
        """Queue one piece. The caller holds the lock."""
        if self._thread is not None and self._due(expert):
            with suppress(RuntimeError):  # the runtime was closed, or the interpreter ends
                self._under_way[expert] = self._thread.submit(self._read, expert)

    def _read(self, expert: int) -> None:
        self._session.read_piece(expert, self._limit)
        with self._lock:
            if self._under_way.pop(expert, None) is not None:  # else somebody waits for this expert
                self._submit(expert)

    def pause(self) -> None:
        """Begin no further piece until `go_on`. Waits for nothing."""
        self._limit = 0

    def wait(self, expert: int) -> None:
        """Take an expert over: wait for the piece that it is reading. Raises what reading raised."""
        with self._lock:
            future = self._under_way.pop(expert, None)
        if future is not None and not future.cancel():
            future.result()

    def settle(self) -> None:
        """Take all experts over. An error that one of them met does not count: it meets it again when it is chosen."""
        for expert in range(len(self._session.names)):
            with suppress(FusionError):
                self.wait(expert)
