"""A command line made of a table of verbs: it imports what it runs, and every verb ends alike."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from fusionroute.runtime import __version__
from fusionroute.runtime.commands.options import Debug
from fusionroute.runtime.commands.verbs import Verb, program, run_verb
from fusionroute.runtime.errors import InputError
from tests.support.commands import Command, in_folder
from tests.support.paths import REPOSITORY

ERRORS: dict[str, BaseException] = {
    "input": InputError("The prompt is empty: give one."),
    "package": ModuleNotFoundError("No module named 'torch'", name="torch"),
    "fault": RuntimeError("one\ntwo"),
    "Ctrl-C": KeyboardInterrupt(),
    "file": PermissionError(errno.EACCES, os.strerror(errno.EACCES), "out.png"),
    "full disk": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "broken pipe": BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)),
    "exit": SystemExit(143),
}


def work(name: str, debug: Debug = False) -> None:
    """Fail as told."""
    raise ERRORS[name]


VERBS = {
    "work": Verb(f"{__name__}:work", "Fail as told.", extra="train"),
    "absent": Verb(f"{__name__.rpartition('.')[0]}.no_such_file:work", "A verb whose module cannot be imported.", extra="export,cpu"),
}


@pytest.fixture(params=["a verb of many", "a verb alone"])
def work_command(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Command]:
    """`work`, run as one verb of a program and as a program of its own."""

    def entry() -> None:
        if request.param == "a verb alone":
            run_verb("work", VERBS["work"])
        else:
            program(VERBS, "Tests.")(args=["work", *sys.argv[1:]])

    with in_folder("program", entry, tmp_path, monkeypatch, capsys) as command:
        yield command


ENDS: dict[str, tuple[int, str]] = {
    "input": (1, "error: The prompt is empty: give one.\n"),
    "package": (1, "error: The command work needs the package 'torch': pip install 'fusionroute[train]'.\n"),
    "fault": (1, "error: The command work failed unexpectedly (RuntimeError: one two). --debug shows where.\n"),
    "Ctrl-C": (1, "error: Interrupted.\n"),
    "file": (1, "error: The command work failed on out.png (Permission denied).\n"),
    "full disk": (1, "error: The command work failed (No space left on device): make room.\n"),
    "broken pipe": (1, ""),
    "exit": (143, ""),
}


@pytest.mark.parametrize("name", ENDS)
def test_errors_end_in_one_sentence(work_command: Command, name: str) -> None:
    ended = work_command(name)
    assert (ended.status, ended.err) == ENDS[name] and ended.out == ""


def test_debug_shows_the_traceback(work_command: Command) -> None:
    ended = work_command("fault", "--debug")
    assert ended.status == 1 and "Traceback" in ended.err and ended.err.endswith(ENDS["fault"][1])


@pytest.mark.parametrize("arguments", [(), ("--colour", "red"), ("fault", "more")])
def test_wrong_usage_has_status_2(work_command: Command, arguments: tuple[str, ...]) -> None:
    ended = work_command(*arguments)
    assert ended.status == 2 and ended.out == "" and "Usage:" in ended.err


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Command]:
    with in_folder("program", program(VERBS, "Tests of verbs."), tmp_path, monkeypatch, capsys) as command:
        yield command


def test_debug_before_the_verb_means_the_same(command: Command) -> None:
    assert "Traceback" in command("--debug", "work", "fault").err
    assert "Traceback" not in command("work", "fault").err


def test_the_list_of_verbs_needs_no_verb(command: Command) -> None:
    ended = command("--help")
    assert ended.status == 0 and all(verb.help in ended.out for verb in VERBS.values())
    assert command("--version").out == f"fusionroute {__version__}, onnxruntime {version('onnxruntime')}\n"
    for arguments in (("absent", "--help"), ("absent",)):
        ended = command(*arguments)
        assert ended.status == 1 and ended.out == ""
        assert ended.err.endswith("no_such_file': pip install 'fusionroute[export,cpu]'.\n")


def python(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """A process in the repository."""
    return subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)


def test_a_command_line_starts_without_what_it_does_not_run() -> None:
    """Neither its verbs' modules nor the packages that are slow to import."""
    code = "import sys; from fusionroute.runtime.__main__ import main; sys.argv[1:] = ['--help']; sys.exit(main())"
    ended = python("-X", "importtime", "-c", code)
    assert ended.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines() if line.startswith("import time:")}
    assert "fusionroute.runtime.commands.verbs" in imported
    verbs = {f"fusionroute.runtime.commands.{name}" for name in ("generate", "bench", "inspect", "build")}
    assert not imported & (verbs | {"torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "matplotlib", "fusionroute.fr_export"})


SIGNALLED = """
import os, signal, sys, time
from fusionroute.runtime.__main__ import main
from fusionroute.runtime.commands import generate

number = int(sys.argv.pop(1))
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs, such as some CI runs, inherit it ignored

def signal_myself(*_):
    os.kill(os.getpid(), number)
    time.sleep(60)

generate.as_object = signal_myself
main()
"""


@pytest.mark.parametrize(("number", "status", "err"), [(signal.SIGINT, 1, "error: Interrupted.\n"), (signal.SIGTERM, 143, "")])
def test_signals_end_a_process_without_a_traceback(bundles: list[Path], number: signal.Signals, status: int, err: str) -> None:
    generate = ("generate", str(bundles[0]), "--prompt-ids", "1,5", "--max-new-tokens", "2", "--json")
    ended = python("-c", SIGNALLED, str(int(number)), *generate)
    assert (ended.returncode, ended.stdout, ended.stderr) == (status, "", err)
