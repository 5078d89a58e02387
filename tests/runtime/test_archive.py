"""A bundle in one file: written, read back, and everything that must not get out of such a file."""

import gzip
import io
import json
import shutil
import tarfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusionroute.runtime import BundleError, FusionError, FusionRuntime, InputError
from fusionroute.runtime.archive import pack, unpack
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.manifest import FORMAT

Member = tuple[tarfile.TarInfo, bytes]


@pytest.fixture
def archive(bundles: list[Path], tmp_path: Path) -> Path:
    pack(Bundle.open(bundles[0]), tmp_path / "bundle.tar")
    return tmp_path / "bundle.tar"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_there_and_back(bundles: list[Path], archive: Path, tmp_path: Path) -> None:
    """Other tools read the file too."""
    with tarfile.open(archive, "r:") as tar:
        members = tar.getmembers()
        assert {member.name: tar.extractfile(member).read() for member in members} == contents(bundles[0])  # type: ignore[union-attr]
        assert members[0].name == "manifest.json" and all(member.isreg() and member.mtime == 0 for member in members)
    done: list[int] = []
    unpack(archive, tmp_path / "new" / "back", done.append)
    assert contents(tmp_path / "new" / "back") == contents(bundles[0])
    assert sum(done) == sum(file.bytes for file in Bundle.open(bundles[0]).manifest.files.values())
    with FusionRuntime.load(tmp_path / "new" / "back", verify=True) as runtime:
        assert len(runtime.generate([1, 5, 9], 2).experts) == 2
    pack(Bundle.open(tmp_path / "new" / "back"), tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == archive.read_bytes()
    (tmp_path / "empty").mkdir()
    unpack(archive, tmp_path / "empty")


def test_members_may_come_in_any_order_behind_the_manifest(bundles: list[Path], archive: Path, tmp_path: Path) -> None:
    first, *others = read(archive)
    write(tmp_path / "turned.tar", [first, *reversed(others)])
    unpack(tmp_path / "turned.tar", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(bundles[0])


def test_what_pack_refuses(bundle: Path, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Bundle.open(bundle)
    with pytest.raises(InputError, match=r"bundle\.tar exists: name another file"):
        pack(opened, archive)
    with pytest.raises(InputError, match="lies inside the bundle"):
        pack(opened, bundle / "graphs" / "bundle.tar")
    weights = next((bundle / "graphs" / "weights").iterdir())
    data = weights.read_bytes()
    weights.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    opened = Bundle.open(bundle)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(BundleError, match=f"{weights.name} was changed after the export"):
        pack(opened, tmp_path / "changed.tar")
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1000))
    for call in (lambda: pack(opened, tmp_path / "full.tar"), lambda: unpack(archive, tmp_path / "full")):
        with pytest.raises(FusionError, match=r"B free: make room, or name another disk"):
            call()
    assert sorted(tmp_path.iterdir()) == before


def read(archive: Path) -> list[Member]:
    with tarfile.open(archive, "r:") as tar:
        return [(member, tar.extractfile(member).read()) for member in tar.getmembers()]  # type: ignore[union-attr]


def write(archive: Path, members: list[Member], format: int = tarfile.GNU_FORMAT) -> None:
    with tarfile.open(archive, "w", format=format) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content) if info.isreg() else None)


def member(name: str, content: bytes = b"x", type: bytes = tarfile.REGTYPE, target: str = "") -> Member:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = type, target, len(content) if type == tarfile.REGTYPE else 0
    return info, content


def edited(members: list[Member], change: Callable[[dict[str, Any]], object]) -> list[Member]:
    """The same archive with another manifest."""
    content = json.loads(members[0][1])
    change(content)
    return [member("manifest.json", json.dumps(content).encode()), *members[1:]]


def changed(original: Member) -> Member:
    info, content = original
    return info, content[:-1] + bytes([content[-1] ^ 1])


def longer(original: Member) -> Member:
    return member(original[0].name, original[1] + b"x")


def files(content: dict[str, Any]) -> dict[str, Any]:
    entries: dict[str, Any] = content["files"]
    return entries


def listed(name: str) -> Callable[[list[Member]], list[Member]]:
    """A file under a name that leads elsewhere, in the archive and in its manifest."""

    def change(members: list[Member]) -> list[Member]:
        entry = next(iter(files(json.loads(members[0][1])).values()))
        return [*edited(members, lambda content: files(content).update({name: entry})), member(name, members[1][1])]

    return change


HOSTILE: dict[str, tuple[Callable[[list[Member]], list[Member]], str]] = {
    "symbolic link": (lambda m: [*m, member("tokenizer.json", type=tarfile.SYMTYPE, target="/etc/passwd")], "is no regular file"),
    "hard link": (lambda m: [m[0], member("graphs/fusion.onnx", type=tarfile.LNKTYPE, target="/etc/passwd"), *m[1:]], "is no regular file"),
    "device": (lambda m: [m[0], member("graphs/fusion.onnx", type=tarfile.CHRTYPE), *m[1:]], "is no regular file"),
    "pipe": (lambda m: [m[0], member("graphs/fusion.onnx", type=tarfile.FIFOTYPE), *m[1:]], "is no regular file"),
    "folder": (lambda m: [m[0], member("graphs", type=tarfile.DIRTYPE), *m[1:]], "is no regular file"),
    "long name": (lambda m: [m[0], member("g" * 200), *m[1:]], "is no regular file"),
    "absolute path": (lambda m: [m[0], member("/tmp/evil"), *m[1:]], "which its manifest does not name"),
    "path that leads out": (lambda m: [m[0], member("../evil"), *m[1:]], "which its manifest does not name"),
    "other spelling": (lambda m: [m[0], member(f"./{m[1][0].name}", m[1][1]), *m[2:]], "which its manifest does not name"),
    "file that is not named": (lambda m: [*m, member("notes.txt")], "which its manifest does not name"),
    "file that comes twice": (lambda m: [*m, m[-1]], "or which came before"),
    "manifest that comes twice": (lambda m: [*m, m[0]], "or which came before"),
    "many entries": (lambda m: [m[0], *[member(f"f{n}") for n in range(10_000)]], "'f0', which its manifest does not name"),
    "file that is left out": (lambda m: m[:-1], "lacks|is shorter"),
    "other content": (lambda m: [*m[:-1], changed(m[-1])], r"was changed or is cut off \(its hashes differ"),
    "other BLAKE3": (
        lambda m: edited(m, lambda content: next(iter(files(content).values())).update(blake3="0" * 64)),
        "was changed or is cut off",
    ),
    "other size": (lambda m: [*m[:-1], longer(m[-1])], "bytes where the manifest says"),
    "manifest that is not first": (lambda m: [*m[1:], m[0]], "does not begin with the manifest"),
    "nothing": (lambda m: [], "does not begin with the manifest"),
    "manifest that is none": (lambda m: [member("manifest.json", b"{"), *m[1:]], "does not fit the bundle format"),
    "manifest of a newer format": (
        lambda m: edited(m, lambda content: content.update({"format": FORMAT + 1})),
        f"has the format {FORMAT + 1}",
    ),
    "manifest with a path that leads out": (listed("../evil"), "is not a path inside the bundle"),
    "manifest with an absolute path": (listed("/evil"), "is not a path inside the bundle"),
    "manifest with another spelling": (listed("./manifest.json"), "is not a path inside the bundle"),
    "manifest that names itself": (listed("manifest.json"), "is listed among the files that it describes"),
    "manifest with an escape sequence": (listed("a\x1b[2J"), "is not a path inside the bundle"),
    "manifest with a drive": (listed("C:evil"), "is not a path inside the bundle"),
    "file that is a folder too": (listed("tokenizer.json/evil"), "tokenizer.json is a file and a folder"),
    "size of a bomb": (
        lambda m: edited(m, lambda content: next(iter(files(content).values())).update(bytes=10**15)),
        "is shorter than its manifest says",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives(archive: Path, tmp_path: Path, name: str) -> None:
    change, words = HOSTILE[name]
    hostile = tmp_path / "hostile.tar"
    write(hostile, change(read(archive)))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((BundleError, OSError), match=words) as caught:
        unpack(hostile, tmp_path / "back")
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before, "nothing is left, here or elsewhere"


def test_archives_that_are_none(archive: Path, tmp_path: Path) -> None:
    data = archive.read_bytes()
    for content, words in (
        (b"", "is no bundle in one file"),
        (b"\0" * 10_240, "does not begin with the manifest"),
        (gzip.compress(data[:10_000]), "is no bundle in one file"),
        (b"PK\3\4" + bytes(2000), "is no bundle in one file"),
        (data[:700], "in the middle of its manifest"),
        (data[: len(data) // 2], "is shorter than its manifest says"),
    ):
        (tmp_path / "none.tar").write_bytes(content)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(BundleError, match=words):
            unpack(tmp_path / "none.tar", tmp_path / "back")
        assert sorted(tmp_path.rglob("*")) == before
    write(tmp_path / "pax.tar", [(info, content) for info, content in read(archive)], tarfile.PAX_FORMAT)
    unpack(tmp_path / "pax.tar", tmp_path / "pax")  # names are short: no header but the plain ones
    info, content = read(archive)[0]
    info.pax_headers = {"comment": "x" * 100_000}
    write(tmp_path / "header.tar", [(info, content)], tarfile.PAX_FORMAT)
    with pytest.raises(BundleError, match="is no regular file"):
        unpack(tmp_path / "header.tar", tmp_path / "back")
    with pytest.raises(BundleError, match="There is no file"):
        unpack(tmp_path / "nowhere.tar", tmp_path / "back")
    with pytest.raises(InputError, match="exists and is not empty: name another folder"):
        unpack(archive, tmp_path / "pax")


def test_a_sparse_member_is_refused(archive: Path, tmp_path: Path) -> None:
    """Its header claims more than the archive holds."""
    first, second, *others = read(archive)
    second[0].type = tarfile.GNUTYPE_SPARSE
    with tarfile.open(tmp_path / "sparse.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for info, content in (first, second, *others):
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(BundleError, match="is no regular file"):
        unpack(tmp_path / "sparse.tar", tmp_path / "back")
