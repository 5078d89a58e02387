"""Command lines run in the test's own process."""

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest


class Ended(NamedTuple):
    """A finished command."""

    status: int
    out: str
    err: str


class Command:
    """Runs `entry`, which returns the exit status, with arguments behind `name`."""

    def __init__(self, name: str, entry: Callable[[], int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self.name, self.entry = name, entry
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> Ended:
        self.monkeypatch.setattr(sys, "argv", [self.name, *map(str, arguments)])
        self.capsys.readouterr()
        return Ended(self.entry(), *self.capsys.readouterr())
