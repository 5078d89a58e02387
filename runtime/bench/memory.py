"""How much memory a part of the work takes, as the operating system counts it."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from typing import NamedTuple

import psutil

INTERVAL = 0.01  # seconds between samples


class Resident(NamedTuple):
    """Bytes of this process in memory: its own, and pages of files that are mapped."""

    anonymous: int
    mapped: int


def resident() -> Resident:
    """Now. Where the system does not tell mapped pages from others (macOS, Windows), all count as the process's own."""
    memory = psutil.Process().memory_info()
    mapped = getattr(memory, "shared", 0)
    return Resident(memory.rss - mapped, mapped)


def available() -> int:
    """Bytes that new work may take without swapping."""
    return int(psutil.virtual_memory().available)


def release_freed() -> None:
    """Give memory that was freed before back to the system (glibc): it would hide what is taken now."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


class PeakMemory:
    """A context manager that samples this process's memory in the background. `peak`: the highest bytes of each kind."""

    def __enter__(self) -> PeakMemory:
        self._before = self.peak = resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    @property
    def growth(self) -> Resident:
        """By how many bytes the peak is above the start."""
        return Resident(self.peak.anonymous - self._before.anonymous, self.peak.mapped - self._before.mapped)

    def _look(self) -> None:
        self.peak = Resident(*map(max, self.peak, resident()))

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._look()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()
