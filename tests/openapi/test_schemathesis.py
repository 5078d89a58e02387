"""Requests drawn from /openapi.json: none is a fault of the server's, and every answer is of the form that it tells.

Slow, in an environment of its own: `make fuzz-api`.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest

from fusionroute.runtime import FusionRuntime
from tests.support.paths import REPOSITORY
from tests.support.server import served

pytestmark = pytest.mark.slow
if find_spec("schemathesis") is None:
    pytest.skip("schemathesis has an environment of its own: make fuzz-api", allow_module_level=True)


SEED, SECONDS = 1, 240
# what JSON schemas cannot say, such as which fields exclude each other, is refused with 400
OPTIONS = ["--checks", "all", "--exclude-checks", "positive_data_acceptance", "--continue-on-failure", "--no-shrink"]


def test_every_answer_is_as_the_schema_says(bundles: list[Path], tmp_path: Path) -> None:
    with served(FusionRuntime.load(bundles[0], precision="fp32", prefix_cache=2), sessions=4, seconds=1.0) as running:
        bounds = ["--seed", SEED, "--max-time", SECONDS, "--max-examples", 1000, "--generation-database", "none"]
        command = [Path(sys.executable).parent / "schemathesis", "run", f"{running.url}/openapi.json", *OPTIONS, *bounds]
        variables = os.environ | {"SCHEMATHESIS_HOOKS": "tests.openapi.hooks", "PYTHONPATH": str(REPOSITORY)}
        ended = subprocess.run([*map(str, command)], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
        counts = re.findall(r'requests_total{path="(/v1/.*completions)",status="200"} (.*)', httpx.get(running.url + "/metrics").text)
    print(ended.stdout, counts)
    assert ended.returncode == 0, ended.stdout[-5000:] + ended.stderr
    assert len(counts) == 2 and min(float(count) for _, count in counts) > 0  # some requests came to the models
