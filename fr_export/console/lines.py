"""Progress where stderr is no terminal, such as in the log of a job: a line every few seconds, so that it is never silent."""

import threading
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console

EVERY = 5.0  # seconds between two lines
UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
WHOLE = 10_000  # smaller counts are shown whole


class Lines:
    """While entered, a thread calls `look` every second. Work that is done within `EVERY` seconds prints nothing."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic):
        self.console, self._clock = console, clock
        self._name, self._total, self._done, self._start = "", 0.0, 0.0, 0.0
        self._printed = clock()
        self._spoken = False  # whether the stage has printed a line
        self._lock = threading.Lock()
        self._left = threading.Event()

    def __enter__(self) -> None:
        self._printed = self._clock()
        self._left.clear()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._left.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._left.wait(1.0):
            self.look()

    def begin(self, name: str, total: float | None) -> Callable[[float], None]:
        """Start a stage of `total` units, None where nobody knows how many; returns the function that counts them."""
        with self._lock:
            self._name, self._total, self._done, self._start, self._spoken = name, total or 0.0, 0.0, self._clock(), False
        return self._advance

    def _advance(self, amount: float) -> None:
        with self._lock:
            self._done += amount

    def end(self) -> None:
        """The stage is done. Says so if it was spoken of before."""
        with self._lock:
            if self._spoken:
                self._print(f"{self._name}: done in {duration(self._clock() - self._start)}")
            self._name = ""

    def look(self) -> None:
        """Print a line if a stage is running and the last line is `EVERY` seconds old."""
        with self._lock:
            if self._name and self._clock() - self._printed >= EVERY:
                self._spoken = True
                self._print(f"{self._name}: {self._progress()}")

    def _progress(self) -> str:
        elapsed = self._clock() - self._start
        if not self._total:
            return duration(elapsed)
        share = min(self._done / self._total, 1.0)
        left = f", about {duration(elapsed * (1 - share) / share)} left" if share else ""
        return f"{count(self._done)} of {count(self._total)}, {share:.0%}, {duration(elapsed)}{left}"

    def _print(self, line: str) -> None:
        self._printed = self._clock()
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Seconds for people: 8 s, 2:05 min, 1:02:05 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02} h"


def count(value: float) -> str:
    """A number of units for people: 7, 1,536, 12.3k, 135M."""
    for size, letter in UNITS:
        if value >= max(size, WHOLE):
            scaled = value / size
            return f"{scaled:.{0 if scaled >= 100 else 1}f}{letter}"
    return f"{value:,.0f}"
