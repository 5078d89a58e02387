"""Requests drawn from /openapi.json: none is a fault of the server's, and every answer is of the form that it tells.

Slow, in an environment of its own: `make fuzz-api`.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from fusionroute.runtime import FusionRuntime
from tests.support.paths import REPOSITORY
from tests.support.server import Served, served

pytestmark = pytest.mark.slow
if find_spec("schemathesis") is None:
    pytest.skip("schemathesis has an environment of its own: make fuzz-api", allow_module_level=True)


SEED, SECONDS, EXAMPLES = 1, 240, 400
ROUTES = ("/v1/completions", "/v1/chat/completions")
# what JSON schemas cannot say, such as which fields exclude each other, is refused with 400
ANY = ["--max-time", SECONDS, "--max-examples", 1000, "--exclude-checks", "positive_data_acceptance"]
VALID = ["--max-examples", EXAMPLES, "--mode", "positive", "--phases", "fuzzing", "--include-path-regex", "completions$"]
WHOLE_STREAMS = "max-stream-events = 1000"


def fuzz(server: Served, folder: Path, hooks: str, options: list[Any]) -> tuple[subprocess.CompletedProcess[str], dict[str, int]]:
    """How schemathesis ended, and how many requests each route answered with status 200."""
    (folder / "schemathesis.toml").write_text(WHOLE_STREAMS)
    common = ["--checks", "all", "--continue-on-failure", "--no-shrink", "--seed", SEED, "--generation-database", "none"]
    command = [Path(sys.executable).parent / "schemathesis", "run", f"{server.url}/openapi.json", *common, *options]
    variables = os.environ | {"SCHEMATHESIS_HOOKS": hooks, "PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run([*map(str, command)], cwd=folder, env=variables, capture_output=True, text=True, check=False)
    counts = re.findall(r'requests_total{path="(.*)",status="200"} (.*)', httpx.get(server.url + "/metrics").text)
    answered = {path: int(float(count)) for path, count in counts}
    print(ended.stdout, answered)
    return ended, answered


def test_every_answer_is_as_the_schema_says(bundles: list[Path], tmp_path: Path) -> None:
    with served(FusionRuntime.load(bundles[0], precision="fp32", prefix_cache=2), sessions=4, seconds=1.0) as running:
        ended, answered = fuzz(running, tmp_path, "tests.openapi.hooks", ANY)
    assert ended.returncode == 0, ended.stdout[-5000:] + ended.stderr
    assert all(answered.get(path, 0) > 0 for path in ROUTES)


def test_every_valid_request_is_answered_whole(bundles: list[Path], tmp_path: Path) -> None:
    with served(FusionRuntime.load(bundles[0], precision="fp32", prefix_cache=2, speculation="auto"), sessions=4) as running:
        ended, answered = fuzz(running, tmp_path, "tests.openapi.valid_bodies", VALID)
    assert ended.returncode == 0, ended.stdout[-5000:] + ended.stderr
    assert all(answered.get(path, 0) >= EXAMPLES for path in ROUTES)
