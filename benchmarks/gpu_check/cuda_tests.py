"""The tests in tests/cuda, on this machine's GPU: each file is one check, in a process of its own that may crash."""

import re
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu_check.budget import Budget
from benchmarks.gpu_check.facts import open_device
from benchmarks.gpu_check.outcome import Finding, Skipped

REPOSITORY = Path(__file__).resolve().parents[2]
LAST_LINES = 40  # of pytest's output, for the report


def run_tests(budget: Budget, file: str, *options: str) -> Finding:
    """Run one file of tests, slow ones too; `options` are pytest's. Raises Skipped without a GPU or its time."""
    open_device()
    # without the fixtures of all tests, which need the exporter's packages
    fixed = ["-p", "no:cacheprovider", "-m", "", "-rs", "--tb=short", "--confcutdir", "tests/cuda"]
    command = [sys.executable, "-m", "pytest", *fixed, *options, f"tests/cuda/{file}"]
    try:
        ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=budget.left())
    except subprocess.TimeoutExpired as cut:
        output = cut.stdout or b""
        done = output.decode(errors="replace") if isinstance(output, bytes) else output
        raise Skipped(f"cut off with the time of this run, after: {' '.join(done.split())[-200:]}") from cut
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", ended.stdout[-400:])}
    said = ", ".join(f"{number} {word}" for word, number in counts.items()) or f"pytest ended with status {ended.returncode}"
    failed = re.findall(r"^(?:FAILED|ERROR) (.+)$", ended.stdout, re.MULTILINE)
    figures = {"status": ended.returncode, "counts": counts, "failed": failed}
    if ended.returncode:
        figures["output"] = (ended.stdout + ended.stderr).splitlines()[-LAST_LINES:]
        said += f"; first: {failed[0]}" if failed else ""
    return Finding(ended.returncode == 0 and counts.get("passed", 0) > 0, said, figures)
