"""Files that appear under their name only when they are complete, locks between processes, and the cache folder."""

from __future__ import annotations

import errno
import logging
import os
import platform
import re
import shutil
import stat
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

# filelock, platformdirs and psutil are imported where they are used: most runs need none, and importing takes time.
if TYPE_CHECKING:
    from filelock import BaseFileLock

LOG = logging.getLogger("fusionroute")
PARTIAL = re.compile(r"\..+\.(?P<host>[0-9a-f]{8})-(?P<pid>\d{1,9})-[0-9a-f]{8}\.partial")
ABANDONED = 86_400.0  # seconds without a change after which nobody writes a partial file any more


def cache_folder() -> Path:
    """The user's cache folder; on Linux `fusionroute` in $XDG_CACHE_HOME, or in ~/.cache without that."""
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("fusionroute", appauthor=False))


def private_folder(kind: str = "") -> Path:
    """The cache folder, or the folder in it of a kind of entries: this user's alone, and made where there is none.

    What other users could write is removed, with a line in the log, since it is used without a look. Raises OSError,
    also where the folder is another user's, or a link.
    """
    root = cache_folder()
    root.parent.mkdir(parents=True, exist_ok=True)
    with _PRIVATE:
        for folder in dict.fromkeys((root, root / kind)):
            _make_private(folder)
    return root / kind


_PRIVATE = threading.Lock()  # a thread must not remove what another begins to write


def _make_private(folder: Path) -> None:
    with suppress(FileExistsError):
        folder.mkdir(0o700)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "the cache folder is a link, or no folder", str(folder))
    if not hasattr(os, "geteuid"):  # Windows, where the user's folders are the user's alone
        return
    if status.st_uid != os.geteuid():
        raise PermissionError(errno.EACCES, "the cache folder belongs to another user", str(folder))
    if status.st_mode & 0o055:
        with suppress(OSError):  # a disk that is mounted for reading only
            folder.chmod(0o700)
    if status.st_mode & 0o022:
        folder.chmod(0o700)
        LOG.warning("Other users could write to %s: what it holds is removed, and made again.", folder)
        for path in list(folder.iterdir()):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The name of a file to write, which then replaces `path` in one step. After an error `path` is as it was.

    The name is a new one each time: two processes that write the same file at once do not mix. What killed processes
    have left of the same file is removed first.
    """
    remove_abandoned(path.parent, path.name)
    partial = partial_name(path)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def replace(path: Path, content: bytes) -> None:
    """Write a file that takes the place of an older one in one step.

    Raises OSError, and then leaves the older one as it was.
    """
    with replacing(path) as partial:
        partial.write_bytes(content)


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which is called `folder` once the block has ended. After an error nothing is left.

    Raises OSError where `folder` has appeared meanwhile and is not empty.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder.parent, folder.name)
    partial = partial_name(folder)
    partial.mkdir()
    try:
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def exchange(first: Path, second: Path) -> bool:
    """Let two files or folders take each other's names in one step, where the system can: `renameat2` of Linux.

    Returns whether it was done. Raises nothing.
    """
    import ctypes

    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(first), here, os.fsencode(second), swap) == 0


def bring_back(folder: Path) -> None:
    """Give a folder its name back, where it was moved aside for another one by a process that was killed before the other
    took its place: see `StagedBundle`. Raises nothing.
    """
    with suppress(OSError):
        for old in list(folder.parent.glob(f".{folder.name}.replaced-*")):
            lock = lock_file(old.with_name(f".{folder.name}.lock-{old.name.rpartition('-')[2]}"))
            if lock is not None:  # without locks nobody knows whether the process goes on
                with lock.acquire(timeout=0):
                    if not folder.exists():
                        old.rename(folder)
                Path(lock.lock_file).unlink(missing_ok=True)


def partial_name(path: Path) -> Path:
    """A new name beside `path` that tells who writes it: `.NAME.HOST-PID-RANDOM.partial`, HOST as a checksum."""
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}-{os.urandom(4).hex()}.partial")


def is_partial(path: Path) -> bool:
    """Whether a file or folder is one that `partial_name` has named."""
    return PARTIAL.fullmatch(path.name) is not None


def remove_abandoned(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes have left half-written in a folder: of the file `name`, or all. Raises nothing."""
    with suppress(OSError):  # there is no such folder, or it may not be read
        for path in list(folder.iterdir()):
            if is_partial(path) and (name is None or path.name.startswith(f".{name}.")):
                with suppress(OSError):  # another process removes it, or it belongs to another user
                    if _abandoned(path):
                        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _abandoned(partial: Path) -> bool:
    """Whether the process that has named it is dead, or nothing was written for a day.

    The day is for processes of other machines, and for ids that another process has now.
    """
    import psutil

    writer = PARTIAL.fullmatch(partial.name)
    if writer is not None and writer["host"] == _host() and not psutil.pid_exists(int(writer["pid"])):
        return True
    return time.time() - partial.stat().st_mtime > ABANDONED


def _host() -> str:
    return f"{zlib.crc32(platform.node().encode()):08x}"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until no other process of this machine, and no other thread, holds the lock file `path`.

    Where the file system has no locks, nothing is waited for. Raises OSError where the file cannot be created.
    """
    path.parent.mkdir(0o700, parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(path.lstat().st_mode):  # opening it would empty what a link leads to, or wait for a FIFO
            LOG.warning("%s is no regular file: the lock is made again.", path)
            path.unlink()
    with lock_file(path) or nullcontext():
        with suppress(OSError):
            os.utime(path)  # the cache tells by it when a lock was last used
        yield


def lock_file(path: Path) -> BaseFileLock | None:
    """The lock file `path`, not held yet; None where the file system has no locks.

    This is asked of a file that nobody else has. Releases of filelock differ in what they do without locks: some wait
    for ever, some raise, and some use marker files that outlive a killed process.
    """
    import tempfile

    from filelock import FileLock

    try:
        import fcntl
    except ImportError:  # Windows, which locks in another way
        return FileLock(path)
    with suppress(OSError), tempfile.TemporaryFile(dir=path.parent) as probe:  # where none can be made, a lock may be
        try:
            fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return None
    return FileLock(path)


def held(path: Path) -> bool:
    """Whether a process or thread holds a lock file; also where this user may not ask."""
    lock = lock_file(path)
    if lock is None:
        return False
    try:
        lock.acquire(timeout=0)
    except OSError:  # filelock's Timeout among them
        return True
    lock.release()
    return False
