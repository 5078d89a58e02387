"""The two commands of the README, for both shipped systems: export, inspect, generate, and the example program."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY


def run(*command: str) -> str:
    process = subprocess.run([sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module", params=["gemma2", "llama3"])
def shipped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """The bundle of a shipped system and the report that export.py printed."""
    out = tmp_path_factory.mktemp("demo") / request.param
    return out, json.loads(run("export.py", "--family", request.param, "--out", str(out), "--json"))


def test_report_of_the_shipped_system(shipped: tuple[Path, dict[str, object]]) -> None:
    out, report = shipped
    assert report == json.loads((out / "report.json").read_text())
    assert report["models"] == ["router", "math", "code", "instruction"]
    variants = {entry["precision"]: entry for entry in report["variants"]}  # type: ignore[attr-defined]
    assert list(variants) == ["fp32", "int8"]
    for reading in ("chunks", "decode"):
        exact, rounded = variants["fp32"]["compared"][reading], variants["int8"]["compared"][reading]
        assert exact["max_difference"] <= 2e-5 * variants["fp32"]["compared"]["largest_logit"]
        assert exact["greedy_agreement"] == exact["routing_agreement"] == 1.0
        assert rounded["greedy_agreement"] >= 0.95 and rounded["routing_agreement"] >= 0.95
    assert variants["int8"]["bytes"] < 0.35 * variants["fp32"]["bytes"]


def test_the_shipped_system_adds(shipped: tuple[Path, dict[str, object]]) -> None:
    out, _ = shipped
    for arguments in ([], ["--chat"], ["--precision", "fp32"]):
        result = json.loads(run("-m", "runtime", "generate", str(out), "--prompt", "12+30=", "--json", *arguments))
        assert "42" in result["text"], result
        assert Counter(result["experts"]).most_common(1)[0][0] == "math"
        assert result["finish_reason"] == "stop"


def test_routing_is_shown(shipped: tuple[Path, dict[str, object]]) -> None:
    out, _ = shipped
    shown = run("-m", "runtime", "generate", str(out), "--prompt", "12+30=", "--show-routing")
    assert "42" in shown.splitlines()[0]
    assert any(line.startswith("math") for line in shown.splitlines()[1:])


def test_inspect_verifies(shipped: tuple[Path, dict[str, object]]) -> None:
    out, _ = shipped
    assert "have the hashes of the manifest" in run("-m", "runtime", "inspect", str(out), "--verify")


def test_example(shipped: tuple[Path, dict[str, object]]) -> None:
    out, _ = shipped
    assert "ended by stop" in run("examples/stream.py", str(out), "12+30=")
