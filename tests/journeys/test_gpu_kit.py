"""`make gpu-kit`: parts that are whole again, and a kit that installs and runs in a namespace without network."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from benchmarks.gpu_check.budget import Budget
from benchmarks.gpu_check.outcome import SKIPPED, Finding, run_check
from benchmarks.gpu_kit import kit, wheels
from benchmarks.gpu_kit.kit import lay_out, tracked
from benchmarks.gpu_kit.parts import PartWriter, pack, write_sums
from fusionroute.runtime.errors import FusionError, InputError
from tests.support.exporting import export_system
from tests.support.systems import Shape

KIT = [sys.executable, "-m", "benchmarks.gpu_kit"]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.binary(max_size=40), max_size=6), st.integers(3, 25))
def test_parts_are_the_whole(tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes], size: int) -> None:
    folder = tmp_path_factory.mktemp("parts")
    writer = PartWriter(folder, "whole", size)
    for piece in pieces:
        assert writer.write(piece) == len(piece)
    contents = [path.read_bytes() for path in writer.paths]
    assert b"".join(contents) == b"".join(pieces)
    assert all(len(content) == size for content in contents[:-1]) and all(0 < len(content) <= size for content in contents)
    assert writer.paths == sorted(folder.iterdir())


def test_an_archive_in_parts_is_joined_and_checked_as_the_script_does(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/file").write_bytes(os.urandom(50_000))
    parts = pack(tmp_path, ["a"], "kit.tar", 9_000)
    write_sums(tmp_path, parts)
    assert len(parts) > 5
    assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path).returncode == 0
    with (tmp_path / "joined").open("wb") as joined:
        for part in parts:
            joined.write(part.read_bytes())
    with tarfile.open(tmp_path / "joined") as tar:
        tar.extractall(tmp_path / "again", filter="data")
    assert (tmp_path / "again/a/file").read_bytes() == (tmp_path / "a/file").read_bytes()
    parts[2].write_bytes(b"x" + parts[2].read_bytes()[1:])
    assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path, capture_output=True).returncode == 1


def test_a_kit_takes_the_checkout_s_files_and_an_empty_folder(tmp_path: Path) -> None:
    names = tracked()
    assert {"runtime/__init__.py", "benchmarks/gpu_kit/run.sh", "tests/cuda/test_device.py"} <= set(names)
    assert not [name for name in names if name.startswith(("dist/", ".venv", "build/"))]
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/manifest.json").write_text("{}")
    with patch.object(kit, "tracked", return_value=["Makefile"]):
        assert lay_out(tmp_path / "kit", [tmp_path / "bundle"]) == tmp_path / "kit/wheels"
        with pytest.raises(InputError, match=r"kit is not empty: name a new folder for the kit\.$"):
            lay_out(tmp_path / "kit", [])
    assert (tmp_path / "kit/bundles/bundle/manifest.json").read_text() == "{}"
    assert (tmp_path / "kit/sources/Makefile").read_bytes() == (kit.REPOSITORY / "Makefile").read_bytes()


def test_what_pip_cannot_fetch_is_one_sentence(tmp_path: Path) -> None:
    ended = subprocess.CompletedProcess([], 1, "", "ERROR: nothing\nERROR: No matching distribution found for numpy\n")
    with patch.object(subprocess, "run", return_value=ended), pytest.raises(FusionError) as refused:
        wheels.fetch(tmp_path, "2.7", "aarch64")
    assert str(refused.value) == (
        "pip cannot fetch the wheels for Python 2.7 on aarch64 (ERROR: No matching distribution found for numpy): name another --python or --onnxruntime."
    )


def test_a_run_s_time_is_kept(tmp_path: Path) -> None:
    """What does not fit is left out, and what is under way is cut off."""
    budget, start = Budget(0.3 / 60), time.monotonic()

    def slow() -> Finding:
        while True:
            time.sleep(0.01)

    cut = run_check("a", "b", slow, budget)
    assert (cut.status, cut.says) == (SKIPPED, "cut off when the 0.005 minutes of this run were over: allow more with --minutes")
    assert 0.25 < time.monotonic() - start < 5
    left_out = run_check("a", "b", slow, budget)
    assert left_out.says == "the 0.005 minutes of this run were over before it: allow more with --minutes"
    assert run_check("a", "b", lambda: Finding(True, "fine", {}), Budget()).says == "fine"


def test_a_missing_package_skips_one_check() -> None:
    def needs() -> Finding:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    outcome = run_check("a", "b", needs, Budget())
    assert (outcome.status, outcome.says) == (SKIPPED, "it needs the package torch, which is not installed here")


def test_another_machine_than_these_two_is_refused(tmp_path: Path) -> None:
    import typer

    from benchmarks.gpu_kit.__main__ import main

    app = typer.Typer()
    app.command()(main)
    ended = CliRunner().invoke(app, [str(tmp_path / "kit"), "--machine", "riscv64"])
    assert ended.exit_code == 2 and not (tmp_path / "kit").exists()


@pytest.mark.slow
def test_a_kit_runs_without_network(tmp_path: Path) -> None:
    """In parts, into a bare interpreter: everything installs, runs or says why not. Fetches 60 MB of wheels with pip."""
    namespace = ["unshare", "--net", "--map-root-user"]
    if shutil.which("unshare") is None or subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("no namespace without network can be made here")
    bundle, _ = export_system(tmp_path / "system", Shape(layers=1, experts=2, tokenizer=True), ("fp32", "int8"))
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    options = ["--part", "20", "--python", python, "--onnxruntime", "onnxruntime", "--bundle", str(bundle)]
    subprocess.run([*KIT, str(tmp_path / "kit"), *options], cwd=kit.REPOSITORY, check=True)
    parts = sorted((tmp_path / "kit").glob("kit.tar.*"))
    assert len(parts) > 2 and all(part.stat().st_size <= 20_000_000 for part in parts)
    assert {path.name for path in (tmp_path / "kit").iterdir()} == {"run.sh", "SHA256SUMS", *(part.name for part in parts)}

    bare = Path(sys.base_prefix) / "bin" / f"python{python}"
    variables = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHON": str(bare), "WORK": str(tmp_path / "work")}
    start = time.monotonic()
    ended = subprocess.run(
        [*namespace, "bash", str(tmp_path / "kit/run.sh"), "--minutes", "8"], cwd=tmp_path, env=variables, capture_output=True, text=True
    )
    assert time.monotonic() - start < 8 * 60 + 30
    assert ended.returncode == 0, ended.stdout + ended.stderr
    figures = json.loads((tmp_path / "work/report/gpu-check.json").read_text())
    statuses = {(outcome["check"], outcome["status"]) for outcome in figures["outcomes"]}
    assert ("device, copies, CUDA, stream orders", "skipped") in statuses and not [each for each in statuses if each[1] == "failed"]
    assert figures["packages"].keys() >= {"onnxruntime", "numpy"} and "torch" not in figures["packages"]
    assert f"{len(figures['outcomes'])} skipped" in ended.stdout or "passed" in ended.stdout

    damaged = parts[1].read_bytes()
    parts[1].write_bytes(hashlib.sha256(damaged).digest() + damaged[32:])
    ended = subprocess.run(["bash", str(tmp_path / "kit/run.sh")], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert ended.returncode == 1 and "error: a file of the kit was damaged on its way; copy it again." in ended.stderr
