"""How much memory a part of the work takes, as the operating system counts it."""

from __future__ import annotations

import threading

import psutil

from fusionroute.runtime.process_memory import Resident, resident

INTERVAL = 0.01  # seconds between samples


def available() -> int:
    """Bytes that new work may take without swapping."""
    return int(psutil.virtual_memory().available)


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
