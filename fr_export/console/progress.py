"""The stages of a long job: progress on the terminal; seconds and peak memory of each for the report."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from fusionroute.runtime.bench.memory import PeakMemory


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
        self.done.append(FinishedStage(name, round(time.perf_counter() - start, 2), round(memory.peak.anonymous / 2**20, 1)))

    def note(self, text: str) -> None:
        """Show a sentence above the progress display."""
        self.progress.console.print(text)

    def report(self) -> list[dict[str, float | str]]:
        """The stages as plain data."""
        return [asdict(stage) for stage in self.done]
