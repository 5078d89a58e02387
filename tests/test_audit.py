"""`.ci/audit.py`: a known hole fails, and where nobody can be asked the audit says so."""

import importlib.util
import json
import subprocess
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from tests.support.paths import REPOSITORY


@pytest.fixture
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", REPOSITORY / ".ci/audit.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answering(packages: list[dict[str, Any]] | None) -> Callable[..., Any]:
    """What stands for pip-audit: `packages`, or an end without an answer."""
    text = "" if packages is None else json.dumps({"dependencies": packages})
    return lambda *_, **__: subprocess.CompletedProcess([], 1, text, "no network")


HOLE = {"name": "jinja2", "version": "3.1.5", "vulns": [{"id": "CVE-2025-27516", "fix_versions": ["3.1.6"]}]}
SOUND = {"name": "numpy", "version": "2.4.6", "vulns": []}
UNKNOWN = {"name": "torch", "skip_reason": "not found"}
SKIPPED = "audit of {}: skipped, since no advisories can be reached from here"
WHAT = ("what is installed", "the oldest releases allowed")


@pytest.mark.parametrize("packages", [None, [], [UNKNOWN]])
def test_without_advisories_it_is_skipped(
    audit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], packages: list[dict[str, Any]] | None
) -> None:
    monkeypatch.setattr(subprocess, "run", answering(packages))
    with pytest.raises(SystemExit) as end:
        audit.main()
    assert end.value.code == 0
    assert capsys.readouterr().out.splitlines() == [SKIPPED.format(what) for what in WHAT]


def test_a_hole_fails(audit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(subprocess, "run", answering([HOLE, SOUND, UNKNOWN]))
    with pytest.raises(SystemExit) as end:
        audit.main()
    assert end.value.code == "\n".join(f"jinja2 3.1.5 ({what}) has CVE-2025-27516: take 3.1.6." for what in WHAT)
    assert capsys.readouterr().out.splitlines() == [f"audit of {what}: 2 packages, 1 that the database does not know" for what in WHAT]


def test_every_dependency_has_a_lower_bound(audit: ModuleType) -> None:
    lowest = audit.lower_bounds()
    assert {"jinja2": "3.1.6", "onnxruntime": "1.23", "filelock": "3.20.3", "cryptography": "46.0.7"}.items() <= lowest.items()
    assert len(lowest) >= 40
