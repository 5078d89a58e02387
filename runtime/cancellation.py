"""What ends a generation from outside: an event that another thread sets, or a deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import TypeVar

from fusionroute.runtime.arguments import real, shown
from fusionroute.runtime.errors import InputError

T = TypeVar("T")
POLL_SECONDS = 0.002  # between two looks at the event and the clock during a long pass
UNWATCHED_TOKENS = 8  # passes up to here take about as long as two single tokens: no thread watches them


class Interrupted(Exception):
    """The generation was cancelled during a pass. Raised and caught within the package."""


class Cancellation:
    """Says whether a generation is to end, and why.

    `deadline`: seconds from now; a value of 0 or less has passed already.
    """

    def __init__(self, cancel: threading.Event | None = None, deadline: float | None = None):
        """Raises InputError for a deadline that is no number, and for a `cancel` without `is_set`."""
        if cancel is not None and not callable(getattr(cancel, "is_set", None)):
            raise InputError(f"cancel is {shown(cancel)}, expected a threading.Event, or None.")
        self._cancel = cancel
        self._end = (
            None
            if deadline is None
            else time.monotonic() + real("deadline", deadline, "a number of seconds from now, or None for no deadline")
        )
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
        """Raise Interrupted if there is a reason to end."""
        if self.reason:
            raise Interrupted

    def wait_for(self, work: Callable[[], T]) -> T:
        """What some work returns that cannot be interrupted: it is left behind in a thread once there is a reason to end.

        Raises what the work raises, and Interrupted.
        """
        if not self.armed:
            return work()
        outcome: Future[T] = Future()

        def run() -> None:
            try:
                outcome.set_result(work())
            except BaseException as error:
                outcome.set_exception(error)

        threading.Thread(target=run, name="fusionroute-cancellation", daemon=True).start()
        while not outcome.done():
            self.check()
            wait((outcome,), POLL_SECONDS)
        return outcome.result()

    @contextmanager
    def interrupting(self, interrupt: Callable[[], None]) -> Iterator[None]:
        """While the body runs, another thread calls `interrupt` again and again once there is a reason to end."""
        done = threading.Event()

        def watch() -> None:
            while not done.wait(POLL_SECONDS):
                if self.reason:
                    interrupt()

        thread = threading.Thread(target=watch, name="fusionroute-cancellation", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
