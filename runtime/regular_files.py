"""Regular files, opened without following links: what is opened lies where it was named, and reading it ends.

A link could lead anywhere, and to another file at each opening. A FIFO or a device would hang the reader, or fill its
memory.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

BY_FOLDER = os.open in os.supports_dir_fd  # not on Windows, where each part of a path is looked at before
NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
NO_WAIT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
LINK = "it is a link, and links are not followed: cp -rL copies what they lead to"
SPECIAL = "it is no regular file"


class Identity(NamedTuple):
    """What tells a file from others, and from itself before a change. Times in nanoseconds.

    `changed` cannot be set: it tells of writes that set `modified` back, and of a file that was moved away and back.
    """

    device: int
    inode: int
    bytes: int
    modified: int
    changed: int


def identity(file: BinaryIO) -> Identity:
    """Of an open file."""
    status = os.fstat(file.fileno())
    return Identity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def open_regular(folder: Path, name: str) -> BinaryIO:
    """Open a file for reading, unbuffered. Only `folder` itself may be reached through links.

    Raises OSError: for links and all but regular files too.
    """

    def opener(_: str, flags: int) -> int:
        parts = PurePosixPath(name).parts
        with _folder(folder, parts[:-1]) as place:
            return _regular(parts[-1] if BY_FOLDER else str(Path(folder, *parts)), flags, place)

    return open(Path(folder, name), "rb", buffering=0, opener=opener)


def read_regular(folder: Path, name: str, most: int) -> bytes:
    """The content of a file that `open_regular` opens. Raises OSError, also for one of more than `most` bytes."""
    with open_regular(folder, name) as file:
        content = _all(file, most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {most} bytes", str(folder / name))
    return content


def _all(file: BinaryIO, most: int) -> bytes:
    pieces = []
    while most and (piece := file.read(min(most, 1 << 22))):
        pieces.append(piece)
        most -= len(piece)
    return b"".join(pieces)


@contextmanager
def open_folder(folder: Path, name: str) -> Iterator[int | None]:
    """A descriptor of a folder in `folder`, reached without following links; None on Windows. Raises OSError."""
    with _folder(folder, PurePosixPath(name).parts) as place:
        yield place


@contextmanager
def _folder(folder: Path, parts: tuple[str, ...]) -> Iterator[int | None]:
    if not BY_FOLDER:
        for count in range(1, len(parts) + 1):
            _refuse(os.lstat(Path(folder, *parts[:count])), stat.S_ISDIR, Path(folder, *parts[:count]))
        yield None
        return
    place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts:
            _refuse(os.stat(part, dir_fd=place, follow_symlinks=False), stat.S_ISDIR, Path(folder, *parts))
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | NO_LINK, dir_fd=place)
            os.close(place)
            place = inner
        yield place
    finally:
        os.close(place)


def _regular(name: str, flags: int, place: int | None) -> int:
    """Open a file; looked at before, since opening a device may do something."""
    _refuse(os.stat(name, dir_fd=place, follow_symlinks=False), stat.S_ISREG, name)
    file = os.open(name, flags | NO_LINK | NO_WAIT, dir_fd=place)
    try:
        _refuse(os.fstat(file), stat.S_ISREG, name)
    except OSError:
        os.close(file)
        raise
    return file


def _refuse(status: os.stat_result, is_expected: object, path: Path | str) -> None:
    """Raise OSError unless a file is of the expected kind."""
    mode = status.st_mode
    if stat.S_ISLNK(mode):
        raise OSError(errno.ELOOP, LINK, str(path))
    if is_expected is stat.S_ISDIR and not stat.S_ISDIR(mode):
        raise NotADirectoryError(errno.ENOTDIR, "it lies below what is no folder", str(path))
    if is_expected is stat.S_ISREG and not stat.S_ISREG(mode):
        kind = IsADirectoryError(errno.EISDIR, "it is a folder", str(path)) if stat.S_ISDIR(mode) else None
        raise kind or OSError(errno.EINVAL, SPECIAL, str(path))
