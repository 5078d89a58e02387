"""Files that appear under their name only when they are complete, and the folder for those that are only kept to save time."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def cache_folder() -> Path:
    """`fusionroute` in $XDG_CACHE_HOME, else in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fusionroute"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The name of a file to write, which then takes the place of `path` in one step. After an error `path` is as it was."""
    beside = path.with_name(f".{path.name}.partial")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def replace(path: Path, content: bytes) -> None:
    """Write a file that takes the place of an older one in one step. Raises OSError, and then leaves the older one as it was."""
    with replacing(path) as beside:
        beside.write_bytes(content)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until no other process of this machine, and no other thread, holds the lock file `path`. Raises OSError where it cannot be made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
