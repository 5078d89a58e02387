"""Commands of the README and of the pages on serving, chat, the playground and lm-eval, as they stand there, in a fresh clone.

Slow: it installs an environment.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

pytestmark = pytest.mark.slow
if not (REPOSITORY / ".git").exists() or shutil.which("curl") is None:
    pytest.skip("needs a checkout by git, and curl", allow_module_level=True)


def blocks(page: str, language: str) -> list[list[str]]:
    """The lines of a page's code blocks in a language, without comments behind them."""
    text = re.sub(r" +# .*$", "", (REPOSITORY / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [block.splitlines() for block in re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)]


INSTALL, CALLS = (blocks("docs/serving.md", "sh")[number] for number in (0, 1))
SERVE = INSTALL[-1]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A clone in which the page's commands before the server were run."""
    folder = tmp_path_factory.mktemp("reader") / "fusionroute"
    subprocess.run(["git", "clone", "--quiet", REPOSITORY, folder], check=True)
    assert len(INSTALL) == 3 and INSTALL[0] == "make demo"
    for command in INSTALL[:-1]:
        run(folder, command)
    yield folder
    shutil.rmtree(folder)


def environment(folder: Path) -> dict[str, str]:
    """As after `. .venv/bin/activate`."""
    return os.environ | {"PATH": f"{folder}/.venv/bin{os.pathsep}{os.environ['PATH']}"}


def run(folder: Path, command: str, told: str | None = None) -> str:
    """What a command prints; `told` is typed."""
    shell = ["bash", "-euo", "pipefail", "-c", command]
    ended = subprocess.run(shell, cwd=folder, env=environment(folder), input=told or "", capture_output=True, text=True, check=False)
    assert ended.returncode == 0, (command, ended.stdout[-2000:], ended.stderr[-2000:])
    return ended.stdout


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """The page's server, at a free port; yields its address."""
    command = [*SERVE.split(), "--port", "0"]
    with subprocess.Popen(command, cwd=folder, env=environment(folder), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            line = process.stderr.readline()
            assert " is served at http://127.0.0.1:" in line, line
            yield line.split()[-1].removesuffix("/v1")
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 143
        finally:
            process.kill()


def test_the_page_on_serving(clone: Path) -> None:
    [[*snippet]] = blocks("docs/serving.md", "python")
    with server(clone) as url:
        assert len(CALLS) >= 8
        for call in CALLS:
            assert run(clone, call.replace("http://127.0.0.1:8000", url) + " --fail")
        script = "\n".join(snippet).replace("http://127.0.0.1:8000", url)
        assert "42" in subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout


def test_the_page_on_the_playground(clone: Path) -> None:
    serve, generate = blocks("docs/playground.md", "sh")[0]
    assert serve == SERVE
    assert "42" in run(clone, generate) and "<script" in (clone / "answer.html").read_text(encoding="utf-8")
    with server(clone) as url:
        assert "playground.js" in run(clone, f"curl -s --fail {url}/")


def test_the_page_on_chats(clone: Path) -> None:
    script = "\n".join(blocks("docs/chat.md", "python")[0])
    assert run(
        clone, "python -", f'from fusionroute import FusionRuntime\nrt = FusionRuntime.load("dist/gemma2")\n{script}\nprint(len(ids))'
    )
    assert "42" in run(clone, "fusionroute chat dist/gemma2", "12+30=\n")


def test_the_page_on_evaluation(clone: Path) -> None:
    demo, install, evaluate = blocks("docs/evaluation.md", "sh")[-1]
    assert demo == INSTALL[0]
    run(clone, install)
    table = run(clone, evaluate)
    assert re.search(r"\|fusionroute_choices\|.*\|acc +\|↑ +\|0\.\d+\|", table), table


def test_the_readme(clone: Path) -> None:
    commands = [line for block in blocks("README.md", "sh") for line in block if line.startswith("python -m runtime")]
    assert len(commands) == 4
    for command in commands:
        assert run(clone, command)
    tokens = run(clone, "python -", "\n".join(blocks("README.md", "python")[0])).splitlines()  # one with its expert per line
    assert "42" in "".join(line.partition(" ")[0] for line in tokens)
