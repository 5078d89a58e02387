"""The time that a run of the check may take: what does not fit is left out, what is under way then is cut off."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from benchmarks.gpu_check.outcome import Skipped


class Budget:
    """`minutes` from now on; None: without end."""

    def __init__(self, minutes: float | None = None):
        self.minutes, self._end = minutes, None if minutes is None else time.monotonic() + 60 * minutes

    def left(self) -> float | None:
        """Seconds that are left, at least 0; None: without end."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    @contextmanager
    def limit(self) -> Iterator[None]:
        """Raises Skipped where there is no time left, or when it ends, as soon as Python code runs again."""
        left = self.left()
        if left is None or threading.current_thread() is not threading.main_thread():
            yield
            return
        if not left:
            raise Skipped(f"the {self.minutes:g} minutes of this run were over before it: allow more with --minutes")
        before = signal.signal(signal.SIGALRM, self._cut)
        signal.setitimer(signal.ITIMER_REAL, left)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _cut(self, number: int, frame: FrameType | None) -> None:
        raise Skipped(f"cut off when the {self.minutes:g} minutes of this run were over: allow more with --minutes")
