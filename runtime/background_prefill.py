"""Background prefill: experts that are not chosen read the text too, so that one chosen late soon answers.

An expert reads up to multiples of PIECE, here or when it is chosen. So the result depends on the tokens, never on the
clock.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from typing import Protocol

from fusionroute.runtime.errors import FusionError
from fusionroute.runtime.limits import boundary


class PieceReader(Protocol):
    """An expert that reads one session's tokens."""

    @property
    def length(self) -> int:
        """How many tokens it has read."""
        ...

    def read_piece(self, limit: int) -> bool:
        """Read one piece of the tokens before `limit`, if a whole one is due and there is room for it; whether there was."""
        ...


class BackgroundPrefill:
    """The background passes of one session, on a thread that all sessions of a runtime share.

    `thread` None: the device queues passes, so the caller queues them itself, one a step.
    """

    def __init__(self, experts: Sequence[PieceReader], thread: Executor | None):
        self._experts, self._thread = experts, thread
        self._lock = threading.Lock()
        self._passes: dict[int, Future[None]] = {}  # by expert: queued or running
        self._limit = 0  # tokens before it stay as they are

    def resume(self, committed: int) -> None:
        """Let experts read what is due among `committed` tokens, which stay as they are until `wait` or `settle`."""
        # the answering pass must read the newest token together with at least one before it
        self._limit = committed - 2
        if self._thread is None:
            expert = min(self._experts, key=lambda expert: expert.length)
            if boundary(expert.length) <= self._limit:
                expert.read_piece(self._limit)
            return
        for number in range(len(self._experts)):
            with self._lock:
                if number not in self._passes:
                    self._submit(number)

    def _submit(self, number: int) -> None:
        """Queue one piece if one is due. The caller holds the lock."""
        if self._thread is not None and boundary(self._experts[number].length) <= self._limit:
            with suppress(RuntimeError):  # the runtime was closed, or the interpreter ends
                self._passes[number] = self._thread.submit(self._read, number)

    def _read(self, number: int) -> None:
        more = self._experts[number].read_piece(self._limit)
        with self._lock:
            if self._passes.pop(number, None) is not None and more:  # else somebody waits for this expert
                self._submit(number)

    def pause(self) -> None:
        """Begin no more pieces until `resume`. Waits for nothing."""
        self._limit = 0

    def wait(self, number: int) -> None:
        """Take an expert over: wait for the piece that it is reading. Raises what reading raised."""
        with self._lock:
            running = self._passes.pop(number, None)
        if running is not None and not running.cancel():
            running.result()

    def settle(self) -> None:
        """Take all experts over. Errors are dropped: an expert meets its error again when it is chosen."""
        for number in range(len(self._experts)):
            with suppress(FusionError):
                self.wait(number)
