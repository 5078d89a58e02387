"""Command lines run in the test's own process."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest


class Ended(NamedTuple):
    """A finished command."""

    status: int
    out: str
    err: str


class Command:
    """Calls `entry`, which returns the exit status, with a command line of `name` and arguments."""

    def __init__(self, name: str, entry: Callable[[], int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self.name, self.entry = name, entry
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> Ended:
        self.monkeypatch.setattr(sys, "argv", [self.name, *map(str, arguments)])
        self.capsys.readouterr()
        return Ended(self.entry(), *self.capsys.readouterr())


@contextmanager
def in_folder(
    name: str, app: Callable[[], None], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """A command line whose `app` always exits, run in a folder; the process keeps its own handler of SIGTERM."""

    def status() -> int:
        with pytest.raises(SystemExit) as end:
            app()
        assert isinstance(end.value.code, int | None)
        return end.value.code or 0

    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "250")
    handler = signal.getsignal(signal.SIGTERM)
    yield Command(name, status, monkeypatch, capsys)
    signal.signal(signal.SIGTERM, handler)
