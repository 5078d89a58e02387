"""A bundle in one file: a tar archive without compression, its manifest first, and its signature behind that.

Whoever unpacks one trusts nothing in it. The manifest is read first; after that only files that it names are taken,
each once, with the size and the SHA-256 that it says. Headers are read one by one here: `tarfile` would follow links,
sparse maps and long headers of any size before it could be asked to refuse them.
"""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from fusionroute.runtime import signing
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.digests import Digest
from fusionroute.runtime.errors import BundleError, FusionError, InputError
from fusionroute.runtime.files import appearing, replacing
from fusionroute.runtime.manifest import Manifest
from fusionroute.runtime.manifest_file import MOST_BYTES, NAME, SIGNATURE, SIGNATURE_BYTES, read_signature, write_signature
from fusionroute.runtime.regular_files import identity
from fusionroute.runtime.tables import size

if TYPE_CHECKING:
    from fusionroute.runtime.file_entry import File

Advance = Callable[[int], None]  # called with the bytes that are done

BLOCK = tarfile.BLOCKSIZE
PIECE = 1 << 22


def pack(bundle: Bundle, file: Path, advance: Advance = lambda _: None) -> None:
    """Write a bundle into one file, which appears when it is complete. Equal bundles give equal files.

    Raises InputError where `file` exists or lies in the bundle, BundleError where a file of the bundle was changed,
    OSError.
    """
    if file.exists():
        raise InputError(f"{file} exists: name another file, or remove it.")
    if bundle.folder.resolve() in file.resolve().parents:
        raise InputError(f"{file} lies inside the bundle {bundle.folder}: name a file outside of it.")
    entries = bundle.manifest.files
    file.parent.mkdir(parents=True, exist_ok=True)
    check_room(sum(map(stored, entries.values())), file.parent)
    with replacing(file) as partial, tarfile.open(partial, "w", format=tarfile.GNU_FORMAT) as archive:
        for name in (NAME, *([] if read_signature(bundle.folder) is None else [SIGNATURE]), *entries):
            with bundle.open_file(name) as stream:
                content = Hashed(stream, advance)
                archive.addfile(header(name, identity(stream).bytes), content)
            if name in entries and not content.is_of(entries[name]):
                raise BundleError(f"{bundle.folder / name} was changed after the export; export the bundle again.")


def unpack(file: Path, folder: Path, advance: Advance = lambda _: None, verify_key: Path | None = None) -> Manifest:
    """Write the bundle in `file` into a new folder, which appears when it is complete and every hash is right.

    `verify_key`: the file of a public key, whose owner must have signed the manifest; nothing is written before.

    Raises InputError where the folder exists, BundleError for a file that is no archive of a bundle or was changed,
    OSError; as `signing.public_key` and `signing.check` do. `folder` is then as it was.
    """
    check_absent(folder)
    key = None if verify_key is None else signing.public_key(verify_key)
    with open_archive(file) as stream:
        text = read_manifest(stream, file)
        signature = read_signature_member(stream, file)
        if key is not None:
            signing.check(text, signature, key, str(file))
        manifest = Manifest.parse(text, f"The manifest in {file}")
        missing = dict(manifest.files)
        if stream.tell() + sum(map(stored, missing.values())) > file.stat().st_size:
            raise BundleError(f"{file} is shorter than its manifest says: copy it again.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        check_room(sum(entry.bytes for entry in missing.values()), folder.parent)
        with appearing(folder) as partial:
            (partial / NAME).write_bytes(text)
            if signature is not None:
                write_signature(partial, signature)
            for name, size in members(stream, file):
                entry = missing.pop(name, None)
                if entry is None:
                    raise BundleError(
                        f"{file} holds {name!r}, which its manifest does not name or which came before: pack the bundle again."
                    )
                if size != entry.bytes:
                    raise BundleError(f"{name} in {file} has {size} bytes where the manifest says {entry.bytes}: pack the bundle again.")
                take(stream, partial, name, entry, advance)
            if missing:
                raise BundleError(f"{file} lacks {next(iter(missing))}: copy it again.")
    return manifest


def check_absent(folder: Path) -> None:
    """Raise InputError unless a folder is free for a new bundle."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty: name another folder.")


def check_room(needed: int, folder: Path) -> None:
    """Raise FusionError where the disk of `folder` has less than `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise FusionError(f"This takes {size(needed)}, but {folder} has {size(free)} free: make room, or name another disk.")


def stored(entry: File) -> int:
    """Bytes of a file in an archive: its header, and its content in whole blocks."""
    return BLOCK + padded(entry.bytes)


def padded(size: int) -> int:
    """A size in whole blocks."""
    return -(-size // BLOCK) * BLOCK


def header(name: str, size: int) -> tarfile.TarInfo:
    """A header that tells nothing of the machine, the user or the time."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    if len(name.encode()) > tarfile.LENGTH_NAME:
        raise InputError(
            f"The name {name} is longer than the {tarfile.LENGTH_NAME} bytes that an archive takes: export with shorter names."
        )
    return info


class Hashed:
    """A file that is hashed while it is read."""

    def __init__(self, stream: BinaryIO, advance: Advance):
        self._stream, self._advance, self._digest = stream, advance, Digest()

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes."""
        piece = self._stream.read(size)
        self._digest.update(piece)
        self._advance(len(piece))
        return piece

    def is_of(self, entry: File) -> bool:
        """Whether what was read has the hashes that the manifest has."""
        return entry.hashes.items() <= self._digest.hexdigests.items()


def open_archive(file: Path) -> BinaryIO:
    """Raises BundleError where there is no such file."""
    if not file.is_file():
        raise BundleError(f"There is no file {file}: expected one that `fusionroute pack` wrote.")
    return file.open("rb")


def read_manifest(stream: BinaryIO, file: Path) -> bytes:
    """The first member's content. Raises BundleError where that is no manifest."""
    name, size = next(members(stream, file), ("", 0))
    if name != NAME or size > MOST_BYTES:
        raise BundleError(f"{file} does not begin with the manifest of a bundle: expected a file that `fusionroute pack` wrote.")
    text = stream.read(size)
    if len(text) < size:
        raise BundleError(f"{file} ends in the middle of its manifest: copy it again.")
    stream.seek(padded(size) - size, 1)
    return text


def read_signature_member(stream: BinaryIO, file: Path) -> bytes | None:
    """The content of the next member if it is a signature; else None, and the member is still to be read."""
    start = stream.tell()
    if next(members(stream, file), ("", 0)) != (SIGNATURE, SIGNATURE_BYTES):
        stream.seek(start)
        return None
    signature = stream.read(SIGNATURE_BYTES)
    stream.seek(padded(SIGNATURE_BYTES) - SIGNATURE_BYTES, 1)
    return signature


def members(stream: BinaryIO, file: Path) -> Iterator[tuple[str, int]]:
    """Names and sizes of the members from here on; whoever iterates reads the content of each, with its padding.

    Raises BundleError for anything but a regular file with a short name.
    """
    while True:
        block = stream.read(BLOCK)
        if block == bytes(BLOCK):
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            raise BundleError(f"{file} is no bundle in one file, or is damaged: expected a file that `fusionroute pack` wrote.") from error
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.size < 0:
            raise BundleError(f"{file} holds {info.name!r}, which is no regular file: pack the bundle again.")
        yield info.name, info.size


def take(stream: BinaryIO, folder: Path, name: str, entry: File, advance: Advance) -> None:
    """Write one member to a new file while hashing it. Raises BundleError where the content is not the manifest's."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    content, left = Hashed(stream, advance), entry.bytes
    with path.open("xb") as target:
        while left and (piece := content.read(min(left, PIECE))):
            target.write(piece)
            left -= len(piece)
    if left or not content.is_of(entry):
        raise BundleError(f"{name} in {stream.name} was changed or is cut off (its hashes differ from the manifest): copy it again.")
    stream.seek(padded(entry.bytes) - entry.bytes, 1)
