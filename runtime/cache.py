"""What the cache folder holds, and its limits: entries that were not used for long are removed, and the least recently
used of too many bytes.

An entry is a file or folder of a kind, `fusionroute/KIND/ENTRY`. Kinds without a limit here are only removed by `clear`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any

from fusionroute.runtime import files
from fusionroute.runtime.errors import reason
from fusionroute.runtime.regular_files import read_regular

LOG = logging.getLogger("fusionroute")
DAY = 86_400.0  # seconds
# kind → seconds without use after which an entry is removed
AGES = {
    "calibration": 30 * DAY,
    "costs": 30 * DAY,
    "locks": 30 * DAY,
    "packed": 30 * DAY,
    "providers": 30 * DAY,
    "rounded": 7 * DAY,
    "verified": 30 * DAY,
}
MOST_TEXT = 1 << 26  # bytes of a file that `read_checked` reads
MOST_BYTES = 50 * 10**9  # that all entries of these kinds may have together
RECENT = 3_600.0  # seconds: an entry used since then is not removed to make room
USER = ".used-by-"  # and a process id: name of a file in an entry's folder, as long as that process may read the folder
CLOCK_ERROR = 60.0  # seconds by which the start of a process is told wrongly where the clock was set since

Clock = Callable[[], float]  # seconds since the epoch


@dataclass(frozen=True)
class Entry:
    """One file or folder of the cache. last_used: seconds since the epoch.

    in_use: by a living process, see `use`; a lock: held by one.
    """

    kind: str
    path: Path
    bytes: int
    last_used: float
    in_use: bool

    def remove(self) -> None:
        """Remove it. Raises OSError."""
        if not self.path.is_dir():
            self.path.unlink(missing_ok=True)
            return
        doomed = files.partial_name(self.path)
        self.path.rename(doomed)  # in one step: nobody finds half of it
        shutil.rmtree(doomed)


def write_checked(path: Path, content: object) -> None:
    """Write what JSON can hold for `read_checked`, with its SHA-256. Raises OSError."""
    if path.is_dir() and not path.is_symlink():  # which no file can replace
        shutil.rmtree(path)
    files.replace(path, json.dumps({"sha256": sha256(content), "content": content}).encode())


def read_checked(path: Path) -> Any:
    """What `write_checked` wrote, and note that it is used now. None where there is nothing, or another: logged."""
    try:
        written = json.loads(read_regular(path.parent, path.name, MOST_TEXT))
        content = written.pop("content")
        if written != {"sha256": sha256(content)}:
            raise ValueError("its checksum is another")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        LOG.warning("%s is not what was written (%s): it is made again.", path, reason(error))
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return content


def sha256(content: object) -> str:
    """Of what JSON can hold."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def entries(kind: str | None = None) -> list[Entry]:
    """All entries, or those of a kind, by kind and the least recently used first.

    Raises OSError for a folder that cannot be read.
    """
    listed = [
        _entry(folder.name, path)
        for folder in _folders(kind)
        for path in folder.iterdir()
        if not path.name.startswith(".") and path.name != "lock"
    ]
    return sorted((entry for entry in listed if entry is not None), key=lambda entry: (entry.kind, entry.last_used))


def _folders(kind: str | None) -> list[Path]:
    """The folders of all kinds, or of one. Raises OSError."""
    root = files.cache_folder()
    return sorted(path for path in root.iterdir() if path.is_dir() and kind in (None, path.name)) if root.is_dir() else []


def _entry(kind: str, path: Path) -> Entry | None:
    """None where another process removes it now."""
    try:
        inner = list(path.rglob("*")) if path.is_dir() else []
        statuses = [part.stat() for part in (path, *inner) if not part.name.startswith(USER)]
    except OSError:
        return None
    size = sum(status.st_size for status in statuses if S_ISREG(status.st_mode))
    users = [part for part in inner if part.name.startswith(USER)]
    in_use = files.held(path) if kind == "locks" else any(list(map(_lives, users)))
    return Entry(kind, path, size, max(status.st_mtime for status in statuses), in_use)


def _lives(user: Path) -> bool:
    """Whether the process of a USER file lives; the file is removed where not.

    A process that has started after the file was written has the id of a dead one.
    """
    import psutil  # imported here: most runs prune nothing

    with contextlib.suppress(ValueError, OSError, psutil.NoSuchProcess):
        process = psutil.Process(int(user.name.removeprefix(USER)))
        if process.create_time() <= user.stat().st_mtime + CLOCK_ERROR:
            return True
    with contextlib.suppress(OSError):
        stat = user.parent.stat()
        user.unlink()
        os.utime(user.parent, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # to remove its mark is no use of the folder
    return False


def use(folder: Path) -> None:
    """Note that this process reads a folder of the cache: it is used now, and stays while the process lives.

    Raises OSError where there is no such folder, or it cannot be written to.
    """
    (folder / f"{USER}{os.getpid()}").touch()
    os.utime(folder)


def prune(incoming: float = 0.0, clock: Clock = time.time, most_bytes: int = MOST_BYTES) -> list[Entry]:
    """Remove entries that are too old, then the least recently used until `incoming` bytes fit into `most_bytes`.

    Called when something new is written. Entries in use, or used in the last hour, stay. Returns what was removed.
    Raises nothing.
    """
    now, doomed = clock(), []
    try:
        for folder in _folders(None):
            files.remove_abandoned(folder)
        limited = sorted((entry for entry in entries() if entry.kind in AGES), key=lambda entry: entry.last_used)
    except OSError:  # a folder that this user may not read: it is cleared by whoever may
        return []
    total = incoming + sum(entry.bytes for entry in limited)
    for entry in limited:
        unused = now - entry.last_used
        if not entry.in_use and unused > RECENT and (unused > AGES[entry.kind] or total > most_bytes):
            doomed.append(entry)
            total -= entry.bytes
    return _remove(doomed)


def clear(kind: str | None = None) -> list[Entry]:
    """Remove all entries, or those of a kind, except those in use; returns what was removed.

    Raises OSError for an unreadable folder.
    """
    for folder in _folders(kind):
        files.remove_abandoned(folder)
    return _remove(entry for entry in entries(kind) if not entry.in_use)


def _remove(doomed: Iterable[Entry]) -> list[Entry]:
    removed = []
    for entry in doomed:
        with contextlib.suppress(OSError):  # of another user, or removed by another process
            entry.remove()
            removed.append(entry)
    return removed
