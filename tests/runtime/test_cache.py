"""The cache folder: what is too old or too much goes, what is in use or new stays; real files with set times."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from fusionroute.runtime import FusionRuntime, cache, files
from fusionroute.runtime.cache import DAY, RECENT, clear, entries, prune
from fusionroute.runtime.speculation import costs
from tests.support.processes import dead_process

NOW = 1_500_000_000.0  # before every file of this run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fusionroute"


def put(folder: Path, name: str, size: int, age: float) -> Path:
    """An entry KIND/NAME of some bytes, a file where the name ends in .json; last used `age` seconds before NOW."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    inner = path
    if path.suffix != ".json":
        path.mkdir()
        inner = path / "model.onnx"
    inner.write_bytes(bytes(size))
    for each in (inner, path):
        os.utime(each, (NOW - age, NOW - age))
    return path


def test_entries_tell_size_and_last_use(folder: Path) -> None:
    assert entries() == []
    paths = [put(folder, "costs/a.json", 10, 5 * DAY), put(folder, "packed/b", 300, 2 * DAY), put(folder, "packed/c", 200, 1 * DAY)]
    (folder / "packed" / "lock").touch()
    files.partial_name(folder / "packed" / "d").mkdir()
    (folder / "build.lock").touch()
    listed = entries()
    assert [(entry.kind, entry.path, entry.bytes, entry.in_use) for entry in listed] == [
        ("costs", paths[0], 10, False),
        ("packed", paths[1], 300, False),
        ("packed", paths[2], 200, False),
    ]
    assert [NOW - entry.last_used for entry in listed] == [5 * DAY, 2 * DAY, 1 * DAY]
    assert [entry.path for entry in entries("packed")] == paths[1:]


def test_what_was_not_used_for_30_days_goes(folder: Path) -> None:
    old = [put(folder, "costs/old.json", 10, 31 * DAY), put(folder, "packed/old", 10, 31 * DAY), put(folder, "providers/old", 10, 31 * DAY)]
    new = [put(folder, "costs/new.json", 10, 29 * DAY), put(folder, "packed/new", 10, 29 * DAY)]
    exporters = put(folder, "another kind/old", 10, 400 * DAY)
    assert {entry.path for entry in prune(clock=lambda: NOW)} == set(old)
    assert {entry.path for entry in entries()} == {*new, exporters}
    assert not list(folder.rglob("*.partial"))
    assert prune(clock=lambda: NOW + 2 * DAY)[0].path == new[0]


def test_the_least_recently_used_makes_room(folder: Path) -> None:
    oldest, middle, newest = (put(folder, f"packed/{name}", 100, age * DAY) for name, age in (("x", 9), ("a", 5), ("m", 1)))
    assert prune(clock=lambda: NOW, most_bytes=300) == []
    assert [entry.path for entry in prune(incoming=50, clock=lambda: NOW, most_bytes=300)] == [oldest]
    assert [entry.path for entry in prune(clock=lambda: NOW, most_bytes=150)] == [middle]
    assert newest.is_dir()


def test_what_is_new_or_in_use_stays(folder: Path) -> None:
    new = put(folder, "packed/new", 1000, RECENT / 2)
    ours, others = put(folder, "packed/ours", 1000, 0), put(folder, "packed/others", 1000, 0)
    cache.use(ours)
    (others / f"{cache.USER}{dead_process()}").touch()
    assert {entry.path: entry.in_use for entry in entries()} == {new: False, ours: True, others: False}
    for path in (ours, others):
        for each in (path, path / "model.onnx"):
            os.utime(each, (NOW - 60 * DAY, NOW - 60 * DAY))
    assert [entry.path for entry in prune(clock=lambda: NOW, most_bytes=10)] == [others]
    assert new.is_dir() and ours.is_dir()
    assert [entry.path for entry in clear()] == [new], "all but what is in use"


def test_use_renews_an_entry(folder: Path) -> None:
    path = put(folder, "packed/a", 10, 60 * DAY)
    cache.use(path)
    [entry] = entries()
    assert entry.bytes == 10 and entry.last_used > NOW - 60 * DAY
    with pytest.raises(OSError):
        cache.use(folder / "packed" / "none")


def test_the_mark_of_a_dead_process_is_removed_and_is_no_use(folder: Path) -> None:
    path = put(folder, "packed/a", 10, 60 * DAY)
    (path / f"{cache.USER}{dead_process()}").touch()
    os.utime(path, (NOW - 60 * DAY, NOW - 60 * DAY))
    for _ in range(2):
        [entry] = entries()
        assert NOW - entry.last_used == 60 * DAY
    assert [inner.name for inner in path.iterdir()] == ["model.onnx"]


def test_a_mark_is_void_once_another_process_has_its_id(folder: Path) -> None:
    """As in containers, where ids are small: this process has started after the mark was written."""
    path = put(folder, "packed/a", 10, 0)
    cache.use(path)
    assert [entry.in_use for entry in entries()] == [True]
    mark = path / f"{cache.USER}{os.getpid()}"
    before = psutil.Process().create_time() - 2 * cache.CLOCK_ERROR
    os.utime(mark, (before, before))
    assert [entry.in_use for entry in entries()] == [False]
    assert not mark.exists()


@pytest.mark.parametrize("remove", [prune, clear])
def test_what_killed_processes_have_left_goes(folder: Path, monkeypatch: pytest.MonkeyPatch, remove: Callable[[], object]) -> None:
    ours = [put(folder, "costs/a.json", 1, 0), put(folder, "calibration/b", 1, 0)]
    dead = dead_process()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: dead)
        left = [files.partial_name(path) for path in ours]
    left[0].touch()
    left[1].mkdir()
    living = files.partial_name(ours[0])
    living.touch()
    remove()
    assert not left[0].exists() and not left[1].exists() and living.exists()


def test_locks_go_when_nobody_holds_them(folder: Path) -> None:
    """Each export to a folder for TensorRT-RTX locks a path of its own."""
    held, free, recent = (folder / "locks" / f"{name}.lock" for name in ("a", "b", "c"))
    for path in (free, recent):
        with files.locked(path):
            pass
    with files.locked(held):
        assert [entry.in_use for entry in entries("locks")] == [path == held for path in (entry.path for entry in entries("locks"))]
        for path in (held, free):
            os.utime(path, (NOW - 31 * DAY, NOW - 31 * DAY))
        assert [entry.path for entry in prune(clock=lambda: NOW)] == [free]
        assert [entry.path for entry in clear()] == [recent]
    with files.locked(held):
        assert entries()[0].last_used > NOW, "to lock it is to use it"


def test_clear_takes_one_kind_or_all(folder: Path) -> None:
    for name in ("costs/a.json", "packed/b", "calibration/c"):
        put(folder, name, 10, DAY)
    assert [entry.kind for entry in clear("costs")] == ["costs"]
    assert [entry.kind for entry in clear()] == ["calibration", "packed"]
    assert entries() == []


def test_packed_weights_are_in_use_while_their_process_lives(bundles: list[Path], folder: Path) -> None:
    old = put(folder, "packed/old", 10, 0)
    os.utime(old / "model.onnx", (1, 1))
    os.utime(old, (1, 1))
    with FusionRuntime.load(bundles[0], "int8", "cpu", threads=1, share_weights=True) as rt:
        packed = entries("packed")
        assert len(packed) == len(rt.bundle.manifest.models) and all(entry.in_use for entry in packed)
        assert not old.exists(), "making new ones removes old ones"
        assert clear("packed") == []
    stale = packed[0].path
    (stale / f"{cache.USER}{os.getpid()}").unlink()
    with FusionRuntime.load(bundles[0], "int8", "cpu", threads=1, share_weights=True):
        assert all(entry.in_use for entry in entries("packed")), "also those that were packed before"


def test_to_read_costs_is_to_use_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs that are in use every day are not removed; they are measured again by their own date."""
    table = ((1.0, 2.0, 3.0, 4.0), (1.0, 2.0, 3.0, 4.0))
    measured = costs.Costs(table, (table,), 1.0)
    monkeypatch.setattr(costs, "measure", lambda *arguments: measured)
    bundle: Any = SimpleNamespace(manifest=SimpleNamespace(model_dump_json=lambda: "{}", experts=["expert"]))
    backend: Any = object()
    assert costs.costs_of(bundle, backend, "int8", 1) == measured
    [path] = (folder / "costs").iterdir()
    content = path.read_bytes()
    os.utime(path, (NOW, NOW))
    assert costs.costs_of(bundle, backend, "int8", 1) == measured
    assert path.stat().st_mtime > NOW and path.read_bytes() == content


def test_costs_are_measured_again_when_they_are_a_month_old(bundles: list[Path], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[object] = []
    measure = costs.measure

    def counted(*arguments: object) -> costs.Costs:
        measured.append(arguments)
        return measure(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(costs, "measure", counted)

    def load() -> Path:
        """The file of the costs of speculation, after loading with it."""
        FusionRuntime.load(bundles[0], "int8", "cpu", threads=1, speculation="auto").close()
        [path] = (folder / "costs").iterdir()
        return path

    path = load()
    for days, count in ((29, 1), (31, 2), (0, 2)):
        content = cache.read_checked(path)
        cache.write_checked(path, content | {"measured": content["measured"] - days * DAY})
        assert load() == path
        assert len(measured) == count, days
    content = cache.read_checked(path)
    experts = len(content["experts"])
    assert costs.read_costs(path, experts, clock=lambda: content["measured"] + 29 * DAY) is not None
    assert costs.read_costs(path, experts, clock=lambda: content["measured"] + 31 * DAY) is None
    assert costs.read_costs(path, experts + 1) is None
    del content["measured"]  # as older versions wrote it
    cache.write_checked(path, content)
    assert costs.read_costs(path, experts) is None
    assert len(clear("costs")) == 1
    load()
    assert len(measured) == 3, "cleared: measured again"
