"""The runtime's command line, run in the test's own process."""

import pytest

from fusionroute.runtime.__main__ import main
from tests.support.commands import Command


def runtime_status() -> int:
    """Run `python -m runtime`."""
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    monkeypatch.setenv("COLUMNS", "200")
    return Command("runtime", runtime_status, monkeypatch, capsys)
