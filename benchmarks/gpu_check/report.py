"""The report as Markdown: one row per outcome, and all figures as JSON below."""

import json
from dataclasses import asdict
from typing import Any

from benchmarks.gpu_check.outcome import FAILED, PASSED, SKIPPED, Outcome


def report(machine: dict[str, Any], outcomes: list[Outcome]) -> str:
    """The whole page. `machine` has time, machine, gpu, libraries (name → version) and packages."""
    gpu = f"a GPU of compute capability {machine['gpu']}" if machine["gpu"] else "no NVIDIA GPU: nothing below ran on one"
    libraries = ", ".join(f"{name} {version}" for name, version in machine["libraries"].items()) or "neither TensorRT nor TensorRT-RTX"
    lines = ["# GPU check", "", f"{machine['time']}, {machine['machine']}, with {gpu}; {libraries}. {count_statuses(outcomes)}.", ""]
    lines += ["| check | of | | |", "|---|---|---|---|"]
    lines += [f"| {outcome.check} | {outcome.subject} | {outcome.status} | {outcome.says.replace('|', '/')} |" for outcome in outcomes]
    figures = as_json(machine, outcomes)
    return "\n".join([*lines, "", "<details><summary>All figures</summary>", "", "```json", figures, "```", "", "</details>", ""])


def as_json(machine: dict[str, Any], outcomes: list[Outcome]) -> str:
    """All figures, for programs."""
    return json.dumps({**machine, "outcomes": [asdict(outcome) for outcome in outcomes]}, indent=1)


def count_statuses(outcomes: list[Outcome]) -> str:
    """`3 passed, 0 failed, 2 skipped`."""
    return ", ".join(f"{sum(outcome.status == status for outcome in outcomes)} {status}" for status in (PASSED, FAILED, SKIPPED))
