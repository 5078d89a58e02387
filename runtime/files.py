"""Files that appear under their name only when they are complete, locks between processes, and the cache folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# filelock and platformdirs are imported where they are used: most runs need neither, and importing takes time.


def cache_folder() -> Path:
    """The user's cache folder; on Linux `fusionroute` in $XDG_CACHE_HOME, or in ~/.cache without that."""
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("fusionroute", appauthor=False))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The name of a file to write, which then replaces `path` in one step. After an error `path` is as it was.

    The name is a new one each time: two processes that write the same file at once do not mix.
    """
    partial = path.with_name(f".{path.name}.{os.urandom(8).hex()}.partial")
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
def locked(path: Path) -> Iterator[None]:
    """Wait until no other process of this machine, and no other thread, holds the lock file `path`.

    Raises OSError where it cannot be created.
    """
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path):
        yield
