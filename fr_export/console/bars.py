"""Progress on a terminal: one bar per stage, with the time that it has taken and the time that it will still take."""

from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bars:
    """Shows bars while it is entered; without entering it they appear when the next thing is printed."""

    def __init__(self, console: Console):
        self.console = console
        columns = (
            TextColumn("{task.description:<34}"), BarColumn(bar_width=18), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        )  # fmt: skip
        self._progress = Progress(*columns, console=console, refresh_per_second=4)
        self._task, self._total = self._progress.add_task("", visible=False), 1.0

    def __enter__(self) -> None:
        self._progress.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def begin(self, name: str, total: float | None) -> Callable[[float], None]:
        """Add a bar; returns the function that advances it. Without a total it moves until the stage ends."""
        self._task, self._total = self._progress.add_task(name, total=total), total or 1.0
        task = self._task
        return lambda amount: self._progress.advance(task, amount)

    def end(self) -> None:
        """The stage is done."""
        self._progress.update(self._task, total=self._total, completed=self._total)
