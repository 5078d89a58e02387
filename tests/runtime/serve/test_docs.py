"""The commands of docs/serving.md, as they stand there."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusionroute.runtime import FusionRuntime
from tests.support.server import Served, served

PAGE = (Path(__file__).parents[3] / "docs/serving.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^curl .*$", PAGE, re.MULTILINE)
pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")


@pytest.fixture(scope="module")
def named(bundles: list[Path]) -> Iterator[Served]:
    with served(FusionRuntime.load(bundles[0], precision="fp32"), model="gemma2", seconds=20) as running:
        yield running


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: re.sub(r".*8000(\S+).*", r"\1", command))
def test_each_call_is_answered(named: Served, command: str) -> None:
    ended = subprocess.run(["bash", "-c", command.replace("http://127.0.0.1:8000", named.url) + " --fail"], capture_output=True, check=True)
    text = ended.stdout.decode()
    if "/metrics" in command:
        assert "fusionroute_requests_total" in text
    elif '"stream": true' in command:
        assert text.startswith('data: {"id":"chatcmpl-') and text.endswith("data: [DONE]\n\n")
    else:
        content = json.loads(text)
        assert "error" not in content
        if '"routing": true' in command:
            assert content["choices"][0]["fusionroute"]["tokens"]
        if "json_schema" in command:
            assert set(json.loads(content["choices"][0]["message"]["content"])) == {"sum"}


def test_the_program_of_the_page_prints_an_answer(named: Served) -> None:
    pytest.importorskip("openai")
    [program] = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    command = [sys.executable, "-c", program.replace("http://127.0.0.1:8000", named.url)]
    printed = subprocess.run(command, capture_output=True, check=True).stdout.decode()
    beginning = named.server.runtime.generate([{"role": "user", "content": "12+30="}], 8).text.rstrip("\ufffd")
    assert beginning and printed.startswith(beginning)


def test_there_is_a_call_of_every_path() -> None:
    paths = set(re.findall(r"`(/[\w/]+)`", PAGE)) - {"/v1"}
    assert paths <= set(re.findall(r"8000(/[\w/]+)", "\n".join(COMMANDS))) and len(paths) >= 6


def test_every_flag_of_the_page_exists() -> None:
    from benchmarks import serving
    from fusionroute.runtime.commands.serve import serve

    benchmark = re.findall(r'"--([a-z-]+)"', Path(serving.__file__).read_text())
    names = {name.replace("_", "-") for name in serve.__annotations__} | {*benchmark}
    for flag in re.findall(r"`--([a-z-]+)", PAGE):
        assert flag in names or flag == "insecure", flag
