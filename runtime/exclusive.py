"""One user at a time: a second thread is told so, where it would mix its tokens into those of the first."""

from __future__ import annotations

import os
import threading

from fusionroute.runtime.errors import BusyError, ClosedError

FORKED = "The runtime was loaded before this process was forked and its threads stayed behind: load the bundle here."


class Exclusive:
    """Held while a thread uses something. `what`: its name in the error."""

    def __init__(self, what: str):
        self._what, self._process = what, os.getpid()
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        """Raises BusyError while it is held, ClosedError where a thread that stayed behind a fork holds it."""
        if not self._lock.acquire(blocking=False):
            if os.getpid() != self._process:
                raise ClosedError(FORKED)
            raise BusyError(f"This {self._what} is in use, by another thread or by the caller: give each thread a {self._what} of its own.")

    def __exit__(self, *_: object) -> None:
        self._lock.release()
