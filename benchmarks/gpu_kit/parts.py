"""Large files in parts of limited size, with hashes, and whole again with `cat`."""

import hashlib
import io
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

PIECE = 1 << 20  # bytes read at a time
SUMS = "SHA256SUMS"


class PartWriter(io.RawIOBase):
    """A file for `tarfile` that is written as NAME.000, NAME.001, … of at most `size` bytes each."""

    def __init__(self, folder: Path, name: str, size: int):
        self._folder, self._name, self._size = folder, name, size
        self.paths: list[Path] = []
        self._room = 0

    def writable(self) -> bool:
        """Bytes are appended."""
        return True

    def write(self, content: Any) -> int:
        """Append bytes."""
        rest = memoryview(content)
        while len(rest):
            if not self._room:
                self.paths.append(self._folder / f"{self._name}.{len(self.paths):03}")
                self.paths[-1].write_bytes(b"")
                self._room = self._size
            piece = rest[: self._room]
            with self.paths[-1].open("ab") as part:
                part.write(piece)
            self._room -= len(piece)
            rest = rest[len(piece) :]
        return len(content)


def pack(folder: Path, names: Iterable[str], archive: str, size: int) -> list[Path]:
    """Write a tar archive of some entries of a folder in parts beside them; returns the parts."""
    writer = PartWriter(folder, archive, size)
    with tarfile.open(fileobj=writer, mode="w|") as tar:
        for name in names:
            tar.add(folder / name, name)
    return writer.paths


def write_sums(folder: Path, paths: Iterable[Path]) -> None:
    """What `sha256sum --check` reads."""
    lines = [f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in sorted(paths)]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def sha256(path: Path) -> str:
    """A file's hash."""
    digest = hashlib.sha256()
    for piece in pieces(path):
        digest.update(piece)
    return digest.hexdigest()


def pieces(path: Path) -> Iterator[bytes]:
    """A file's bytes."""
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            yield piece
