"""What others put into the user's cache folder: it is told, not followed, not waited for, and made again."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusionroute.runtime import FusionRuntime, UnavailableError, cache, files
from fusionroute.runtime.backends.prepacked_weights import GRAPH, RECORD, WEIGHTS, make, ready
from fusionroute.runtime.speculation import costs

PROMPT = [5, 6, 7]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches" / "fusionroute"


def answer(bundle: Path, **options: Any) -> list[int]:
    with FusionRuntime.load(bundle, "int8", "cpu", threads=1, **options) as runtime:
        return runtime.generate(PROMPT, 4).token_ids


def modes(folder: Path) -> set[int]:
    return {path.stat().st_mode & 0o777 for path in (folder, *folder.iterdir())}


def test_folders_are_the_user_s_alone(bundle: Path, folder: Path, quick: None) -> None:
    umask = os.umask(0)
    try:
        answer(bundle, share_weights=True, speculation="auto")
    finally:
        os.umask(umask)
    assert {path.name for path in folder.iterdir()} == {"packed", "costs", "verified"}
    assert modes(folder) == {0o700}


def packed(folder: Path) -> Path:
    return sorted(path for path in (folder / "packed").iterdir() if path.is_dir())[0]


def into_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def into_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


CHANGES: dict[str, Callable[[Path], object]] = {
    "other weights of the same size": lambda place: (place / WEIGHTS).write_bytes(b"\xff" * (place / WEIGHTS).stat().st_size),
    "another graph": lambda place: (place / GRAPH).write_bytes(b"graph"),
    "no graph": lambda place: (place / GRAPH).rename(place / "other"),
    "a graph that is a link": lambda place: into_link(place / GRAPH),
    "weights that are a FIFO": lambda place: into_fifo(place / WEIGHTS),
    "a record that is a FIFO": lambda place: into_fifo(place / RECORD),
    "a record of deep JSON": lambda place: (place / RECORD).write_text("[" * 200_000),
    "a record that names other files": lambda place: cache.write_checked(place / RECORD, {"../x": ["0", [0, 0, 0, 0, 0]]}),
    "a record of another shape": lambda place: cache.write_checked(place / RECORD, [1]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_packed_weights_that_are_not_those_that_were_written(folder: Path, log: list[str], change: str) -> None:
    place = files.private_folder("packed") / "entry"

    def write(entries: dict[str, str], path: Path) -> None:
        path.write_bytes(b"packed")
        path.with_name(WEIGHTS).write_bytes(b"weights")

    make(place, 0, write)
    assert ready(place) and log == []
    CHANGES[change](place)
    assert not ready(place)
    assert len(log) == 1 and (str(place) in log[0]) and ("written again" in log[0] or log[0].endswith("it is made again."))
    make(place, 0, write)
    assert ready(place) and len(log) == 2, "told once by `ready` and once by `make`, and whole again"


def test_packed_weights_of_other_numbers_are_not_loaded(bundle: Path, folder: Path, log: list[str]) -> None:
    expected = answer(bundle, share_weights=True)
    CHANGES["other weights of the same size"](packed(folder))
    assert answer(bundle, share_weights=True) == expected
    assert log[0] == f"The packed weights in {packed(folder)} were changed: they are written again."


def test_packed_weights_that_were_copied_are_hashed_and_used(bundle: Path, folder: Path, log: list[str]) -> None:
    answer(bundle, share_weights=True)
    place = packed(folder)
    copied = Path(shutil.copytree(place, place.with_name("copy")))
    shutil.rmtree(place)
    copied.rename(place)
    inode = (place / WEIGHTS).stat().st_ino
    answer(bundle, share_weights=True)
    assert (place / WEIGHTS).stat().st_ino == inode and log == []


@pytest.mark.parametrize("kind", ["a link", "a FIFO"])
def test_a_lock_that_is_no_file(bundle: Path, folder: Path, tmp_path: Path, log: list[str], kind: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    lock = files.private_folder("packed") / "lock"
    if kind == "a link":
        lock.symlink_to(victim)
    else:
        os.mkfifo(lock)
    answer(bundle, share_weights=True)
    assert victim.read_text() == "precious"
    assert log == [f"{lock} is no regular file: the lock is made again."]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is timed."""
    table = ((1.0, 2.0, 3.0, 4.0), (1.0, 2.0, 3.0, 4.0))
    monkeypatch.setattr(costs, "measure", lambda bundle, _: costs.Costs(table, (table,) * len(bundle.manifest.experts), 1.0))


COSTS: dict[str, Callable[[Path], object]] = {
    "nested deeply": lambda path: path.write_text("[" * 200_000),
    "another number": lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"fusion": 10**400})),
    "a number of 10,000 digits": lambda path: path.write_text("9" * 10_000),
    "too large": lambda path: os.truncate(path, cache.MOST_TEXT + 1),
    "a FIFO": into_fifo,
    "a link": into_link,
    "a folder": into_folder,
}


@pytest.mark.parametrize("change", COSTS)
def test_costs_that_are_not_those_that_were_written(bundle: Path, folder: Path, quick: None, log: list[str], change: str) -> None:
    expected = answer(bundle, speculation="auto")
    [path] = (folder / "costs").iterdir()
    COSTS[change](path)
    assert answer(bundle, speculation="auto") == expected
    assert [line.split(" (")[0] for line in log] == [f"{path} is not what was written"] and log[0].endswith("): it is made again.")


@pytest.mark.parametrize("content", [{}, {"experts": []}, {"fusion": 10**400}, {"router": [[1.0] * 4] * 2, "experts": "x"}])
def test_costs_of_another_shape_are_measured_again(bundle: Path, folder: Path, quick: None, content: dict[str, Any]) -> None:
    expected = answer(bundle, speculation="auto")
    [path] = (folder / "costs").iterdir()
    cache.write_checked(path, cache.read_checked(path) | content if content else {})
    assert answer(bundle, speculation="auto") == expected


def test_what_others_could_write_is_removed(bundle: Path, folder: Path, log: list[str]) -> None:
    expected = answer(bundle, share_weights=True)
    (folder / "packed").chmod(0o777)
    left = packed(folder) / "left"
    left.touch()
    assert answer(bundle, share_weights=True) == expected
    assert log == [f"Other users could write to {folder / 'packed'}: what it holds is removed, and made again."]
    assert not left.exists() and modes(folder) == {0o700}


@pytest.mark.parametrize("part", ["", "packed"])
def test_a_cache_folder_that_is_a_link_is_not_used(bundle: Path, folder: Path, tmp_path: Path, part: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (folder / part).parent.mkdir(parents=True, exist_ok=True)
    (folder / part).symlink_to(elsewhere)
    with pytest.raises(UnavailableError, match=r"the cache folder is a link, or no folder.*name another cache folder in XDG_CACHE_HOME"):
        answer(bundle, share_weights=True)
    assert list(elsewhere.iterdir()) == []
    assert answer(bundle) == answer(bundle), "what the cache is not needed for goes on without it"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_cache_folder_of_another_user_is_not_used(bundle: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    os.chown(folder, 12345, 12345)
    with pytest.raises(UnavailableError, match="the cache folder belongs to another user"):
        answer(bundle, share_weights=True)
    assert answer(bundle) and list(folder.iterdir()) == []
