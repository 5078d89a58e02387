"""The C++ example is built and run: it streams what Python streams, and ends when it is told to."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from fusionroute.runtime import FusionRuntime
from tests.support.bundles import copy_with_ends
from tests.support.paths import REPOSITORY

PROMPT = "12+30="


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, built without optimisation, which is faster to build."""
    for tool in ("cmake", "g++"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed: nothing to build the C++ example with")
    if importlib.util.find_spec("pybind11") is None:
        pytest.skip("pybind11 is not installed: pip install pybind11")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        pytest.skip("Python.h is not installed (on Debian and Ubuntu: apt install python3-dev)")
    folder = tmp_path_factory.mktemp("cpp_embed")
    source = REPOSITORY / "examples" / "cpp_embed"
    options = [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Debug"]
    for command in (["cmake", "-S", str(source), "-B", str(folder), *options], ["cmake", "--build", str(folder)]):
        build = subprocess.run(command, capture_output=True, text=True, check=False)
        assert build.returncode == 0 and "warning:" not in build.stderr, build.stdout + build.stderr
    return folder / "cpp_embed"


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [str(program), sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_the_example_streams_what_python_does_and_can_be_stopped(program: Path, bundles: list[Path]) -> None:
    for folder in bundles:
        process = run(program, str(folder), PROMPT)
        assert process.returncode == 0 and not process.stderr, process.stderr
        printed = {line.split(" ", 1)[0]: line.split(" ", 1)[1].strip() for line in process.stdout.splitlines()}
        with FusionRuntime.load(folder) as rt:
            expected = rt.generate(PROMPT, 24)
            free = rt.generate(PROMPT, 400, temperature=1.0, seed=1)
        pairs = zip(expected.token_ids, expected.experts, strict=True)
        assert printed["tokens"] == " ".join(f"{id}:{expert}" for id, expert in pairs)
        assert printed["reason"] == expected.finish_reason
        assert printed["session"] == f"{expected.token_ids[0]} best {expected.token_ids[0]}"
        assert printed["InputError"].startswith("temperature is -1.0, expected 0 or at least")
        assert printed["logic_error"] == "thrown by a callback"
        assert printed["ClosedError"] == "The runtime was closed: load the bundle again."
        if len(free.token_ids) > 300:  # too long to end by itself
            reason, _, more, _ = printed["cancel"].split()
            assert reason == "cancelled" and int(more) <= 4, "the token under way, and up to three that waited for a character's end"
            assert printed["deadline"].startswith("over by ")


def test_a_wrong_interpreter_throws_and_does_not_end_the_program(program: Path, bundles: list[Path], tmp_path: Path) -> None:
    expected = ": name the bin/python of an environment that has fusionroute installed.\n"
    bare = tmp_path / "bare" / "bin" / "python"
    venv.create(bare.parents[1], with_pip=False)
    cases = {str(tmp_path / "nowhere"): "There is no Python at", str(tmp_path): "There is no Python at", str(bare): "The Python of"}
    for python, begin in cases.items():
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        process = subprocess.run(
            [str(program), python, str(bundles[0]), PROMPT], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert process.returncode == 1, process.stderr
        assert process.stderr.startswith(f"error: {begin} {python}") and process.stderr.endswith(expected), process.stderr
        assert process.stderr.count("\n") == 1
    assert "cannot import fusionroute (No module named 'fusionroute')" in process.stderr


def test_a_text_that_ends_before_the_deadline_is_said_so(program: Path, bundles: list[Path], tmp_path: Path) -> None:
    folder = copy_with_ends(bundles[0], tmp_path / "ending", list(range(300)))  # every token ends the text
    process = run(program, str(folder), PROMPT)
    assert process.returncode == 0, process.stderr
    (line,) = [line for line in process.stdout.splitlines() if line.startswith("deadline")]
    assert re.fullmatch(r'deadline unused, since the text ended by "stop" after \d+\.\d{3} ms', line), line


def test_the_example_ends_with_the_sentence_of_what_is_wrong(program: Path, bundles: list[Path], tmp_path: Path) -> None:
    process = run(program, str(tmp_path), PROMPT)
    assert process.returncode == 1 and process.stderr.startswith("error: ")
    assert str(tmp_path) in process.stderr and process.stderr.count("\n") == 1
    process = run(program, str(bundles[0]), PROMPT, "int2")
    assert process.returncode == 1 and "has no precision 'int2'" in process.stderr
