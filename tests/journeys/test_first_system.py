"""The page "Your first own system in ten minutes", command by command, on a base of two small layers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fr_export.training.conftest import TEMPLATE
from tests.support.paths import REPOSITORY
from tests.support.systems import Shape, make_model

PAGE = REPOSITORY / "docs/first-system.md"
INSTALL = "pip install"  # the test has an environment already


def blocks(language: str) -> list[str]:
    """The page's code blocks in a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader would stand: a checkout's examples, and a base."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "examples").symlink_to(REPOSITORY / "examples")
    base = make_model(folder / "base", Shape("llama3", tokenizer=True, layers=2), seed=0, expert=False)
    (base / "chat_template.jinja").write_text(TEMPLATE)  # one that ends every turn, as real ones do
    return folder


def test_the_page_works_as_it_is_written(folder: Path) -> None:
    commands = [block for block in blocks("sh") if INSTALL not in block]
    script = "\n".join(commands)
    assert script.count("BASE=") == 1 and script.count("--max-steps 30") == 2
    script = re.sub(r"BASE=\S+", f"BASE={folder / 'base'}", script).replace("--max-steps 30", "--max-steps 2")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    shell = ["bash", "-euo", "pipefail", "-c", script]
    ended = subprocess.run(shell, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    for name in ("math", "code", "form", "untrained", "router"):
        assert (folder / "my" / name).is_dir()
    [embedding] = blocks("python")
    ended = subprocess.run([sys.executable, "-c", embedding], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
