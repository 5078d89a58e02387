"""Examples that are called wrongly say how they are called, without a traceback."""

import subprocess
import sys

import pytest

from tests.support.paths import REPOSITORY

USAGE = {"stream.py": "BUNDLE PROMPT", "node.py": "BUNDLE [SECONDS]", "first_system/data.py": "FOLDER"}
CALLS = [
    ("stream.py", ()),
    ("stream.py", ("bundle",)),
    ("node.py", ()),
    ("node.py", ("bundle", "soon")),
    ("node.py", ("bundle", "1", "2")),
    ("first_system/data.py", ()),
]


@pytest.mark.parametrize(("name", "arguments"), CALLS)
def test_how_an_example_is_called(name: str, arguments: tuple[str, ...]) -> None:
    command = [sys.executable, str(REPOSITORY / "examples" / name), *arguments]
    process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stderr) == (1, f"usage: python examples/{name} {USAGE[name]}\n")
