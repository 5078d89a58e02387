"""How much memory a precision takes, as the operating system counts it."""

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


class Growth:
    """A context manager that samples this process's memory in the background; `peak` is the largest growth of each kind
    since it was entered.
    """

    def __enter__(self) -> Growth:
        with contextlib.suppress(OSError, AttributeError, TypeError):
            ctypes.CDLL(None).malloc_trim(0)  # memory freed before must not hide what is taken now
        self._before = resident()
        self.peak = Resident(0, 0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        now = resident()
        self.peak = Resident(*(max(old, new - start) for old, new, start in zip(self.peak, now, self._before, strict=True)))

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._look()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()
