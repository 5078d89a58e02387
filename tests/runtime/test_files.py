"""Files that are replaced in one step, locks, and where the cache folder is."""

import threading
from pathlib import Path

import pytest

from fusionroute.runtime.files import cache_folder, locked, replace, replacing


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


def test_a_lock_keeps_other_threads_out(tmp_path: Path) -> None:
    entered = threading.Event()

    def enter() -> None:
        with locked(tmp_path / "folder" / "lock"):
            entered.set()

    other = threading.Thread(target=enter)
    with locked(tmp_path / "folder" / "lock"):
        other.start()
        assert not entered.wait(0.3)
    assert entered.wait(60)
    other.join(60)


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
