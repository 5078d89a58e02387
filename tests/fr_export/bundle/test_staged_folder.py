"""A bundle appears complete or not at all, and nothing of the user's is ever replaced."""

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusionroute.fr_export.bundle.staged_folder import StagedBundle
from fusionroute.runtime import files
from fusionroute.runtime.errors import FusionError, InputError
from fusionroute.runtime.files import partial_name
from tests.support.staging import DEAD, bundle, contents, fill, notes, stage, texts


def test_a_bundle_appears_with_its_parents_and_alone(tmp_path: Path) -> None:
    stage(tmp_path / "a" / "b" / "bundle")
    assert texts(tmp_path) == bundle("new", "a/b/bundle")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["bundle"]


def test_force_replaces_a_bundle_and_only_with_force(out: Path, tmp_path: Path) -> None:
    fill(out, "old")
    with pytest.raises(InputError, match=rf"A bundle exists at {out}: add --force to replace it, or name another folder with --out\."):
        stage(out)
    assert texts(tmp_path) == bundle("old")
    stage(out, force=True)
    assert texts(tmp_path) == bundle("new")


def test_force_replaces_what_a_killed_write_has_left_in_a_bundle(out: Path, tmp_path: Path) -> None:
    fill(out, "old")
    partial_name(out / "manifest.json").write_text("{")
    stage(out, force=True)
    assert texts(tmp_path) == bundle("new")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Bundles are written as elsewhere; what a killed process has left stays, since nobody knows whether it runs."""

    def refuses(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuses)
    fill(tmp_path / f".bundle.partial-{DEAD}", "theirs")
    fill(out, "old")
    stage(out, force=True)
    assert texts(tmp_path) == bundle("new") | bundle("theirs", f".bundle.partial-{DEAD}")
    assert not list(tmp_path.glob("*lock*")) and not list(tmp_path.glob(".*lock*"))


def test_an_empty_folder_holds_nothing_to_lose(out: Path, tmp_path: Path) -> None:
    out.mkdir()
    stage(out)
    assert texts(tmp_path) == bundle("new")


def web_page(out: Path) -> None:
    """Browsers read files of this name too."""
    out.mkdir()
    (out / "manifest.json").write_text('{"name": "my page", "icons": []}')
    (out / "index.html").write_text("mine")


def list_of_files(out: Path) -> None:
    """Other tools list their files in it too."""
    out.mkdir()
    (out / "manifest.json").write_text('{"files": {"index.html": "1.0"}}')
    (out / "index.html").write_text("mine")


def broken_manifest(out: Path) -> None:
    fill(out, "old")
    (out / "manifest.json").write_text('{"format":')


def manifest_of_no_files(out: Path) -> None:
    fill(out, "old")
    (out / "manifest.json").write_text('{"format": 1, "family": "x", "models": []}')


def plain_file(out: Path) -> None:
    out.write_text("mine")


def link_to_file(out: Path) -> None:
    (out.parent / "mine.txt").write_text("mine")
    out.symlink_to("mine.txt")


def notes_in_a_bundle(out: Path) -> None:
    fill(out, "old")
    (out / "graphs" / "notes.txt").write_text("mine")


def link_in_a_bundle(out: Path) -> None:
    fill(out, "old")
    (out / "mine").symlink_to(out.parent)


USERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "notes": (notes, "exists and is no bundle"),
    "web page": (web_page, "exists and is no bundle"),
    "list of files": (list_of_files, "exists and is no bundle"),
    "broken manifest": (broken_manifest, "exists and is no bundle"),
    "manifest of no files": (manifest_of_no_files, "exists and is no bundle"),
    "file": (plain_file, "exists and is no bundle"),
    "link to a file": (link_to_file, "exists and is no bundle"),
    "notes in a bundle": (notes_in_a_bundle, r"notes\.txt is no part of the bundle that --force replaces: move it away"),
    "link in a bundle": (link_in_a_bundle, "mine is no part of the bundle"),
}


@pytest.mark.parametrize("name", USERS)
def test_what_is_the_users_stays(out: Path, tmp_path: Path, name: str) -> None:
    make, words = USERS[name]
    make(out)
    before = contents(tmp_path)
    with pytest.raises(InputError, match=rf"{words}.*--out\."):
        stage(out, force=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", USERS)
def test_what_appears_meanwhile_stays_too(out: Path, tmp_path: Path, name: str) -> None:
    make, words = USERS[name]
    with pytest.raises(InputError, match=words), StagedBundle(out, True) as staging:
        fill(staging.folder, "new")
        make(out)
        users = {path: text for path, text in contents(tmp_path).items() if not path.startswith(".")}
    assert contents(tmp_path) == users


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    link = tmp_path / "bundle"
    for text, present in (("old", False), ("new", True)):
        link.unlink(missing_ok=True)
        link.symlink_to(elsewhere / "target")
        stage(link, text, force=present)
        assert texts(tmp_path) == {"bundle": "link"} | bundle(text, "elsewhere/target")


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt(), SystemExit(143), OSError(errno.ENOSPC, "full")])
@pytest.mark.parametrize("old", [False, True])
def test_a_failure_leaves_what_was_there(out: Path, tmp_path: Path, error: BaseException, old: bool) -> None:
    if old:
        fill(out, "old")
    with pytest.raises(type(error)), StagedBundle(out, True) as staging:
        fill(staging.folder, "new")
        raise error
    assert texts(tmp_path) == (bundle("old") if old else {})
    assert [path.name for path in tmp_path.iterdir()] == (["bundle"] if old else [])


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.EACCES, "denied")])
@pytest.mark.parametrize("failing", [1, 2])
def test_a_failing_rename_brings_the_old_bundle_back(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int, error: type[BaseException] | BaseException
) -> None:
    """Where the system cannot exchange folders."""
    fill(out, "old")
    monkeypatch.setattr(files, "exchange", lambda first, second: False)
    rename, calls = Path.rename, 0

    def fails(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(BaseException) as caught:
        stage(out, force=True)
    assert caught.type is (error if isinstance(error, type) else type(error))
    assert texts(tmp_path) == bundle("old")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("place", ["file/bundle", "file/deeper/bundle", "x" * 300 + "/bundle"])
def test_places_that_cannot_be_written(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FusionError, match=r"Cannot write to .*: name a folder you may write to with --out\."):
        stage(tmp_path / place)
    assert contents(tmp_path) == {"file": "mine"}


def test_a_folder_that_may_not_be_written(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir = Path.mkdir

    def refuse(self: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        if self.name.startswith("."):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        mkdir(self, mode, parents, exist_ok)

    monkeypatch.setattr(Path, "mkdir", refuse)  # modes do not bind every user
    with pytest.raises(FusionError, match=rf"Cannot write to {out.parent} \(Permission denied\): name a folder"):
        stage(out)


def test_a_mount_point_is_refused_before_any_work(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's volume: nothing can be renamed to it, which was found after the work."""
    out.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == out)
    words = rf"^{out} is a mount point, .*: name a folder below it with --out\.$"
    with pytest.raises(InputError, match=words):
        stage(out)
    with pytest.raises(InputError, match=words):
        StagedBundle(out, True).refuse()
    stage(out / "below")


def test_a_folder_above_that_may_not_be_written_is_seen_without_writing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != out.parent)
    with pytest.raises(FusionError, match=rf"Cannot write to {out.parent / 'a'} \(Permission denied\)"):
        StagedBundle(out.parent / "a" / "b", False).refuse()


def test_a_link_to_itself_is_refused(out: Path) -> None:
    out.symlink_to(out.name)
    with pytest.raises(InputError, match=rf"^{out} is a link that leads back to itself: .*--out\.$"):
        StagedBundle(out, True)
