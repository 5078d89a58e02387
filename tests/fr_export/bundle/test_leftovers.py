"""What a killed export left is cleared or brought back by the next; what another still writes is not."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusionroute.fr_export.bundle.staged_folder import StagedBundle
from fusionroute.runtime.errors import InputError
from tests.support.staging import DEAD, bundle, fill, notes, stage, texts


@pytest.mark.parametrize("pid", [DEAD, os.getpid(), os.getppid()], ids=["dead", "own", "taken"])
def test_the_next_export_clears_what_a_killed_one_left(out: Path, tmp_path: Path, pid: int) -> None:
    """Even if another process has its id now, as happens in containers, where ids are small."""
    fill(tmp_path / f".bundle.partial-{pid}", "half")
    (tmp_path / f".bundle.lock-{pid}").touch()
    stage(out)
    assert texts(tmp_path) == bundle("new")


@pytest.mark.parametrize("pid", [DEAD, os.getpid(), os.getppid()], ids=["dead", "own", "taken"])
def test_a_bundle_moved_aside_comes_back(out: Path, tmp_path: Path, pid: int) -> None:
    """Killed between the two renames: whatever the next export does, the old bundle is there again."""
    fill(tmp_path / f".bundle.replaced-{pid}", "old")
    fill(tmp_path / f".bundle.partial-{pid}", "half")
    with pytest.raises(InputError, match="add --force"):
        stage(out)
    assert texts(tmp_path) == bundle("old")


def test_a_bundle_moved_aside_is_replaced_with_force(out: Path, tmp_path: Path) -> None:
    fill(tmp_path / f".bundle.replaced-{DEAD}", "old")
    stage(out, force=True)
    assert texts(tmp_path) == bundle("new")


def test_a_bundle_moved_aside_goes_once_the_new_one_stands(out: Path, tmp_path: Path) -> None:
    fill(tmp_path / f".bundle.replaced-{DEAD}", "old")
    fill(out, "newer")
    with pytest.raises(InputError, match="add --force"):
        stage(out)
    assert texts(tmp_path) == bundle("newer")


def test_a_bundle_moved_aside_is_kept_where_other_files_took_its_place(out: Path, tmp_path: Path) -> None:
    fill(tmp_path / f".bundle.replaced-{DEAD}", "old")
    notes(out)
    with pytest.raises(InputError, match="is no bundle"):
        stage(out, force=True)
    assert texts(tmp_path) == bundle("old", f".bundle.replaced-{DEAD}") | {"bundle/notes.txt": "mine"}


@pytest.mark.parametrize(
    "name", [".bundle.partial-x", ".bundle.partial-", ".bundle.backup-1", f".bundle2.partial-{DEAD}", ".bundle.partial"]
)
def test_names_that_are_not_ours_are_left_alone(out: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "file").write_text("mine")
    stage(out)
    assert texts(tmp_path) == bundle("new") | {f"{name}/file": "mine"}


HOLD = """
import sys, time
from pathlib import Path
from fusionroute.fr_export.bundle.staged_folder import StagedBundle
with StagedBundle(Path(sys.argv[1]), True) as staging:
    (staging.folder / "file").write_text("theirs")
    print(staging.folder.name, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other(out: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that is writing to the same place."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_a_second_export_to_one_place_is_refused_at_once(out: Path, tmp_path: Path, other: "subprocess.Popen[str]") -> None:
    """It used to work for hours and then to fail, or to replace what the first had written."""
    assert other.stdout is not None
    theirs = other.stdout.readline().strip()
    for force in (False, True):
        with pytest.raises(InputError, match=rf"^Process {other.pid} is writing to {out} already: .*--out\.$"):
            stage(out, force=force)
        with pytest.raises(InputError, match=f"^Process {other.pid} "):
            StagedBundle(out, force).refuse()
    assert texts(tmp_path) == {f"{theirs}/file": "theirs", theirs.replace("partial", "lock"): ""}, "what the first writes is not touched"
    stage(tmp_path / "elsewhere")
    other.send_signal(signal.SIGKILL)
    other.wait()
    stage(out)
    assert texts(tmp_path) == bundle("new") | bundle("new", "elsewhere")


def test_asking_before_any_work_changes_nothing(out: Path, tmp_path: Path) -> None:
    fill(tmp_path / f".bundle.partial-{DEAD}", "half")
    before = texts(tmp_path)
    StagedBundle(out, False).refuse()
    StagedBundle(tmp_path / "a" / "b", False).refuse()
    assert texts(tmp_path) == before and not (tmp_path / "a").exists()
