"""Exports killed half-way: no half-written bundle, the old one survives, and the next export cleans up."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fusionroute.fr_export.bundle.staged_folder import StagedBundle
from fusionroute.fr_export.export import TABLE
from fusionroute.fr_export.precision.kept_matrices import KIND
from fusionroute.runtime import FusionRuntime, InputError
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.manifest import Manifest
from tests.support.killed_exports import Exporter, exporting
from tests.support.paths import REPOSITORY


@pytest.fixture(scope="module")
def exporter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exporter]:
    with exporting(tmp_path_factory.mktemp("killed"), "fp32,int8") as exporter:
        yield exporter


FAST = ("--precision", "fp32", "--calibration", "none")
ENDS = {signal.SIGTERM: 143, signal.SIGINT: 1, signal.SIGKILL: -signal.SIGKILL}


def test_killed_exports_and_the_ones_after_them(exporter: Exporter) -> None:
    """First without an old bundle, then over one."""
    for kill in ENDS:
        status, err = exporter.run(*FAST, kill=kill)
        assert status == ENDS[kill]
        assert "Traceback" not in err
        if kill == signal.SIGINT:
            assert err.splitlines()[-1] == "error: Interrupted; nothing was written."
        assert not exporter.out.exists()
        assert bool(exporter.present()) == (kill == signal.SIGKILL), "only what cannot be caught leaves something"
    assert exporter.run(*FAST)[0] == 0
    assert exporter.present() == ["bundle"]
    Bundle.open(exporter.out).verify()

    before = (exporter.out / "manifest.json").read_bytes()
    for kill in (signal.SIGTERM, signal.SIGKILL):
        status, _ = exporter.run("--force", *FAST, "--fusion", "additive", kill=kill)
        assert status == ENDS[kill]
        assert (exporter.out / "manifest.json").read_bytes() == before
        with FusionRuntime.load(exporter.out, verify=True) as runtime:
            assert len(runtime.generate([1, 5, 9], 2).experts) == 2
        assert (exporter.present() == ["bundle"]) == (kill != signal.SIGKILL)
    assert exporter.run("--force", *FAST, "--fusion", "additive")[0] == 0
    assert exporter.present() == ["bundle"]
    assert json.loads((exporter.out / "manifest.json").read_text())["fusion"] == "additive"
    Bundle.open(exporter.out).verify()


def written(exporter: Exporter) -> dict[str, str]:
    """The hashes of what an export wrote, but for files with times, and with a header in any order."""
    Bundle.open(exporter.out).verify()
    return {name: file.sha256 for name, file in Manifest.read(exporter.out).files.items() if name not in ("report.json", TABLE)}


def kept(exporter: Exporter) -> list[Path]:
    return list(exporter.cache.glob(f"fusionroute/{KIND}/*/*.json"))


def test_a_rerun_goes_on_from_what_was_finished(exporter: Exporter) -> None:
    """From texts and models that were calibrated, and from single matrices; broken ones are rounded again."""
    shutil.rmtree(exporter.cache, ignore_errors=True)
    assert exporter.run("--force")[0] == 0
    expected = written(exporter)
    assert not kept(exporter), "they are removed when the export has succeeded"
    status, _ = exporter.run("--force", kept=9)
    assert status == -signal.SIGKILL and len(kept(exporter)) == 9 and written(exporter) == expected
    broken = next(path for path in exporter.cache.glob(f"fusionroute/{KIND}/*/*.bin") if path.stat().st_size > 1000)
    content = broken.read_bytes()
    broken.unlink()  # it may be a link of another export's file
    broken.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    status, err = exporter.run("--force")
    assert status == 0 and written(exporter) == expected and not kept(exporter)
    assert "resumed: 2 of 2 recorded texts" in err
    for name in ("router", "expert0", "expert1"):
        assert f"resumed: calibration of {name}" in err
    assert "of an earlier export is rounded again (it is not what was kept)." in err
    assert "resumed: int8 of " in err
    assert exporter.run("--force", kept=3)[0] == -signal.SIGKILL
    assert exporter.run("--force", "--max-seq-len", "48")[0] == 0  # another context: other texts, and nothing fits
    assert "resumed: int8" not in (exporter.folder / "stderr").read_text() and len(kept(exporter)) == 3


@pytest.mark.slow
def test_kills_at_every_stage_and_at_random(exporter: Exporter, capsys: pytest.CaptureFixture[str]) -> None:
    """Each leaves the old bundle, and the next export is the one that nobody has killed. Prints a table."""
    exporter.run("--force")  # the server may still be starting
    shutil.rmtree(exporter.cache, ignore_errors=True)
    start = time.monotonic()
    assert exporter.run("--force")[0] == 0
    seconds, expected = time.monotonic() - start, written(exporter)
    stages = [stage["name"] for stage in json.loads((exporter.out / "report.json").read_text())["stages"]]
    draw = random.Random(5)
    kills: list[tuple[str, dict[str, Any]]] = [(name, {"stage": number}) for number, name in enumerate(stages, 1)]
    kills += [("at random", {"after": draw.uniform(0, seconds)}) for _ in range(80)]
    killed, resumed = Counter[str](), Counter[str]()
    for name, how in kills:
        shutil.rmtree(exporter.cache, ignore_errors=True)
        status, _ = exporter.run("--force", **how)
        killed[name] += status == -signal.SIGKILL
        assert status in (0, -signal.SIGKILL) and written(exporter) == expected
        status, err = exporter.run("--force")
        assert status == 0 and written(exporter) == expected and exporter.present() == ["bundle"] and not kept(exporter)
        resumed[name] += "resumed: " in err
    with capsys.disabled():
        print(f"\n{'killed while':40} kills  resumed")
        for name in dict.fromkeys(name for name, _ in kills):
            print(f"{name:40} {killed[name]:5}  {resumed[name]:7}")
        print(f"{'together':40} {killed.total():5}  {resumed.total():7}")
    assert killed["at random"] >= 50 and all(killed[name] for name in stages)


REPLACE = """
import os, signal, sys
from pathlib import Path
from fusionroute.fr_export.bundle.staged_folder import StagedBundle
from fusionroute.runtime import files

rename, calls = Path.rename, []

def renames(self, target):
    calls.append(1)
    if len(calls) == int(sys.argv[2]) + 1:
        os.kill(os.getpid(), getattr(signal, sys.argv[3]))
    return rename(self, target)

Path.rename = renames
files.exchange = lambda first, second: False  # as where the system has none
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
signal.signal(signal.SIGINT, signal.default_int_handler)
with StagedBundle(Path(sys.argv[1]), True) as staging:
    (staging.folder / "manifest.json").write_text('{"format": 1, "family": "new", "models": [], "files": {}}')
"""


@pytest.mark.parametrize(("name", "done"), [("SIGKILL", 0), ("SIGKILL", 1), ("SIGKILL", 2), ("SIGTERM", 1), ("SIGINT", 1)])
def test_killed_while_a_bundle_is_replaced(tmp_path: Path, name: str, done: int) -> None:
    """After 0, 1 or both renames (both: nothing kills it) the next export sees the old bundle or the new one, whole."""
    out = tmp_path / "bundle"
    out.mkdir()
    (out / "manifest.json").write_text('{"format": 1, "family": "old", "models": [], "files": {}}')
    killed = subprocess.run(
        [sys.executable, "-c", REPLACE, str(out), str(done), name], cwd=REPOSITORY, stderr=subprocess.DEVNULL, timeout=60, check=False
    )
    assert (killed.returncode == 0) == (done == 2)
    caught = name != "SIGKILL" or done == 2
    assert out.exists() == (caught or done == 0)
    with pytest.raises(InputError, match="add --force"), StagedBundle(out, False):
        pass
    assert json.loads((out / "manifest.json").read_text())["family"] == ("new" if done == 2 else "old")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    if not caught:
        with StagedBundle(out, True) as staging:
            (staging.folder / "manifest.json").write_text("new")
        assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.slow
def test_as_a_process(exporter: Exporter, tmp_path: Path) -> None:
    """`python export.py` ended by SIGTERM as soon as it has begun to write."""
    out = tmp_path / "dist" / "bundle"
    process = subprocess.Popen(
        [sys.executable, "export.py", *exporter.flags, "--out", str(out)], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 120
    while not list(tmp_path.glob("dist/.bundle.partial-*/graphs/weights")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in err
    assert not list((tmp_path / "dist").iterdir())


TURNED = """
import os, signal
from pathlib import Path
from fusionroute.runtime.command_errors import one_sentence

with one_sentence("export", "{}", Path("out"), "nothing was written", False):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except SystemExit as end:
        raise ImportError("initialization failed") from end
"""


def test_an_exit_that_a_library_turned_into_its_own_error() -> None:
    """As an extension module does that is being imported when SIGTERM comes."""
    ended = subprocess.run([sys.executable, "-c", TURNED], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (143, "")
