"""`python -m runtime plan`, run in the test's own process."""

import pytest

from tests.runtime.commands.conftest import runtime_status
from tests.support.commands import Command


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    monkeypatch.setenv("COLUMNS", "80")
    return Command("runtime", runtime_status, monkeypatch, capsys)
