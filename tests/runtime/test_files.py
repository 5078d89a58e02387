"""Files that are replaced in one step, locks, and where the cache folder is."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fusionroute.runtime import files
from fusionroute.runtime.files import cache_folder, held, is_partial, locked, partial_name, remove_abandoned, replace, replacing
from tests.support.processes import dead_process


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path) as first, replacing(path) as second:
        assert first != second and {first.parent, second.parent} == {tmp_path}
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert path.read_bytes() == b"first", "the last to end"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace(path, b"old")
    with pytest.raises(ValueError, match="halfway"), replacing(path) as partial:
        partial.write_bytes(b"ne")
        raise ValueError("halfway")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


KILLED = """
import os, signal, sys
from pathlib import Path
from fusionroute.runtime.files import replacing
with replacing(Path(sys.argv[1])) as partial:
    partial.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif("sys.platform == 'win32'")
def test_the_next_write_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert subprocess.run([sys.executable, "-c", KILLED, path], check=False).returncode == -signal.SIGKILL
    [left] = tmp_path.iterdir()
    assert is_partial(left) and left.read_bytes() == b"half"
    replace(tmp_path / "other", b"other")
    assert left.exists(), "of another file"
    replace(path, b"new")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "other"]


def test_partials_of_living_processes_stay_for_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of another machine may live, even if no process here has its id."""
    ours = partial_name(tmp_path / "file")
    monkeypatch.setattr(os, "getpid", dead_process)
    dead = partial_name(tmp_path / "file")
    monkeypatch.setattr("platform.node", lambda: "another")
    theirs = partial_name(tmp_path / "file")
    monkeypatch.undo()
    foreign = tmp_path / ".file.partial"  # a user's
    for path in (ours, theirs, foreign):
        path.touch()
    dead.mkdir()
    (dead / "inner").touch()
    remove_abandoned(tmp_path)
    assert set(tmp_path.iterdir()) == {ours, theirs, foreign}
    yesterday = time.time() - 1.1 * files.ABANDONED
    for path in (ours, theirs, foreign):
        os.utime(path, (yesterday, yesterday))
    remove_abandoned(tmp_path)
    assert set(tmp_path.iterdir()) == {foreign}
    remove_abandoned(tmp_path / "none")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_nothing_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refuses(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuses)
    (tmp_path / "lock").touch()
    entered = threading.Event()

    def enter() -> None:
        with locked(tmp_path / "lock"):
            entered.set()

    other = threading.Thread(target=enter, daemon=True)
    with locked(tmp_path / "lock"):
        other.start()
        assert entered.wait(60), "both at once"
    other.join(60)
    assert not held(tmp_path / "lock")
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_lock_keeps_other_threads_out(tmp_path: Path) -> None:
    entered = threading.Event()

    def enter() -> None:
        with locked(tmp_path / "folder" / "lock"):
            entered.set()

    other = threading.Thread(target=enter)
    with locked(tmp_path / "folder" / "lock"):
        assert held(tmp_path / "folder" / "lock")
        other.start()
        assert not entered.wait(0.3)
    assert entered.wait(60)
    other.join(60)
    assert not held(tmp_path / "folder" / "lock")


def test_a_lock_that_cannot_be_created_raises(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError), locked(tmp_path / "file" / "lock"):
        pass


@pytest.mark.skipif("sys.platform != 'linux'")
def test_the_cache_folder_is_where_it_always_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "fusionroute"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == Path.home() / ".cache" / "fusionroute"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "fusionroute"
