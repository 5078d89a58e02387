"""What ends a generation from outside: an event that another thread sets, or a deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isnan

from fusionroute.runtime.errors import InputError

TICK = 0.002  # seconds between two looks at the event and the clock while a chunk of tokens is read
LONG = 8  # tokens: chunks up to here take about as long as two single tokens, and are not looked after


class Interrupted(Exception):
    """Tokens are no longer wanted. Raised and caught within the package."""


class Watch:
    """Says why to stop, if at all. The deadline is in seconds from now, and has passed already where it is not positive."""

    def __init__(self, cancel: threading.Event | None = None, deadline: float | None = None):
        """Raises InputError for a deadline that is no number."""
        given: object = deadline
        if given is not None and (isinstance(given, bool) or not isinstance(given, (int, float)) or isnan(given)):
            raise InputError(f"deadline is {deadline!r}, expected a number of seconds from now, or None for no deadline.")
        self._cancel = cancel
        self._end = None if deadline is None else time.monotonic() + float(deadline)
        self.armed = cancel is not None or deadline is not None

    @property
    def reason(self) -> str | None:
        """ "cancelled", "deadline", or None to go on."""
        if self._cancel is not None and self._cancel.is_set():
            return "cancelled"
        if self._end is not None and time.monotonic() >= self._end:
            return "deadline"
        return None

    def check(self) -> None:
        """Raise Interrupted where there is a reason to stop."""
        if self.reason:
            raise Interrupted

    @contextmanager
    def over(self, interrupt: Callable[[], None]) -> Iterator[None]:
        """While the body runs, another thread calls `interrupt` as soon, and as long, as there is a reason."""
        over = threading.Event()

        def look() -> None:
            while not over.wait(TICK):
                if self.reason:
                    interrupt()

        thread = threading.Thread(target=look, name="fusionroute-watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
