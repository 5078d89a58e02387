"""The log of a job: stages with their times, versions, the command line, and the traceback of a failure."""

import io
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console

from fusionroute.fr_export.console.log import logging_to
from fusionroute.fr_export.console.progress import Stages
from fusionroute.runtime import __version__
from fusionroute.runtime.errors import InputError

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d  ")


def run(log: Path, out: Path, error: BaseException | None = None) -> None:
    with logging_to(log, out) as entries:
        stages = Stages(Console(file=io.StringIO()), entries)
        with stages.stage("tracing"):
            stages.note("a note to the user")
        assert "tracing: " in log.read_text(), "it can be followed while the job runs"
        if error is not None:
            raise error


def test_what_a_job_did_when(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["export.py", "--expert", "math=my models/math"])
    run(tmp_path / "log", tmp_path / "bundle")
    lines = (tmp_path / "log").read_text().splitlines()
    assert all(TIME.match(line) for line in lines)
    texts = [TIME.sub("", line) for line in lines]
    assert texts[0] == "export.py --expert 'math=my models/math'"
    assert texts[1].startswith(f"fusionroute {__version__}, python 3.") and "numpy" in texts[1]
    assert texts[3:5] == ["tracing …", "a note to the user"]
    assert re.fullmatch(r"tracing: 0\.\d\d s, peak memory [\d,]+ MiB", texts[5])
    assert texts[6:] == ["done"]


@pytest.mark.parametrize("error", [ValueError("the cause"), KeyboardInterrupt(), SystemExit(143)])
def test_a_failure_is_logged_with_its_traceback(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        run(tmp_path / "log", tmp_path / "bundle", error)
    text = (tmp_path / "log").read_text()
    assert "Traceback (most recent call last)" in text and "raise error" in text and type(error).__name__ in text
    assert not text.endswith("done\n")


def test_no_log_is_no_file(tmp_path: Path) -> None:
    with logging_to(None, tmp_path / "bundle") as entries:
        entries.line("nowhere")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["bundle/export.log", "bundle"])
def test_a_log_inside_of_the_bundle_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"would lie in the folder that is written .* outside of it with --log\.$"):
        run(tmp_path / name, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def test_a_log_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^The log .* cannot be written \(No such file or directory\): name another file with --log\.$"):
        run(tmp_path / "nowhere" / "log", tmp_path / "bundle")
