"""The stages of a long job: progress on the console; seconds and peak memory of each for the report and the log."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from rich.console import Console

from fusionroute.fr_export.console.bars import Bars
from fusionroute.fr_export.console.lines import Lines
from fusionroute.fr_export.console.log import Log
from fusionroute.runtime.bench.memory import PeakMemory


@dataclass
class FinishedStage:
    """One finished stage. Its memory is anonymous: the page cache that mapped files use is not counted."""

    name: str
    seconds: float
    peak_anonymous_mib: float


class Stages:
    """Runs stages one after the other. `progress` shows them on the console while it is entered: bars on a terminal,
    elsewhere a line every few seconds.
    """

    def __init__(self, console: Console, log: Log | None = None):
        self.done: list[FinishedStage] = []
        self.progress = Bars(console) if console.is_terminal and not console.is_dumb_terminal else Lines(console)
        self._log = log or Log()

    @contextmanager
    def stage(self, name: str, total: float | None = None) -> Iterator[Callable[[float], None]]:
        """Show and measure one stage; yields the function that counts what is done of `total`."""
        self._log.line(f"{name} …")
        advance = self.progress.begin(name, total)
        start = time.perf_counter()
        with PeakMemory() as memory:
            yield advance
        self.progress.end()
        finished = FinishedStage(name, round(time.perf_counter() - start, 2), round(memory.peak.anonymous / 2**20, 1))
        self.done.append(finished)
        self._log.line(f"{name}: {finished.seconds:.2f} s, peak memory {finished.peak_anonymous_mib:,.0f} MiB")

    def note(self, text: str) -> None:
        """Show a sentence for the user, and log it."""
        self._log.line(text)
        self.progress.console.print(text)

    def report(self) -> list[dict[str, float | str]]:
        """The stages as plain data."""
        return [asdict(stage) for stage in self.done]
