"""The stages of a long job: progress on the terminal; seconds and peak memory of each for the report."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

INTERVAL = 0.02  # seconds between samples of the memory


@dataclass
class FinishedStage:
    """One finished stage. Its memory is anonymous: the page cache that mapped files use is not counted."""

    name: str
    seconds: float
    peak_anonymous_mib: float


class Stages:
    """Runs stages one after the other under one progress display on stderr."""

    def __init__(self, console: Console):
        self.done: list[FinishedStage] = []
        self.progress = Progress(
            TextColumn("{task.description:<34}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=False,
        )

    @contextmanager
    def stage(self, name: str, total: float | None = None) -> Iterator[Callable[[float], None]]:
        """Show and measure one stage; yields the function that advances its bar."""
        task = self.progress.add_task(name, total=total or 1.0)
        start = time.perf_counter()
        with PeakMemory() as memory:
            yield lambda amount: self.progress.advance(task, amount)
        self.progress.update(task, completed=total or 1.0)
        self.done.append(FinishedStage(name, round(time.perf_counter() - start, 2), round(memory.peak / 2**20, 1)))

    def note(self, text: str) -> None:
        """Show a sentence above the progress display."""
        self.progress.console.print(text)

    def report(self) -> list[dict[str, float | str]]:
        """The stages as plain data."""
        return [asdict(stage) for stage in self.done]


class PeakMemory:
    """Samples this process's anonymous memory in the background. `peak` is the highest value in bytes."""

    def __enter__(self) -> "PeakMemory":
        self.peak = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(INTERVAL):
            self.peak = max(self.peak, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous_bytes())


def anonymous_bytes() -> int:
    """Resident memory of this process in bytes, without mapped files where the system tells them apart (Linux)."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))
