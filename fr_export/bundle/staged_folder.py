"""A folder that appears under its name only when it is complete: it is written beside that name, then renamed."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from fusionroute.runtime import files
from fusionroute.runtime.bundle import is_leftover
from fusionroute.runtime.errors import FusionError, InputError, one_line, reason
from fusionroute.runtime.manifest_file import MOST_BYTES, NAME, SIGNATURE
from fusionroute.runtime.regular_files import read_regular

if TYPE_CHECKING:
    from filelock import BaseFileLock
    from typing_extensions import Self


LOG = logging.getLogger("fusionroute")
NO_MANIFEST = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL, errno.EFBIG)  # of what stands in its place


class Staging:
    """Context manager: write into `.folder`. Leaving it without an error moves the folder to `out`, else removes it.

    A process writes `.NAME.partial-PID` beside `out`. Once that is complete, it changes names with an older folder, in one
    step. Where the system cannot do that, the older folder is moved to `.NAME.replaced-PID` first; a load, or the next
    start, brings it back where its process was killed just then. The process locks the file `.NAME.lock-PID` meanwhile. Thus the next start tells
    leftovers of a killed process, which it recovers or removes, from the work of a running one, beside which it refuses
    to start.
    Subclasses say what they replace: `mark`, `owns` and `check`.
    """

    mark = ""  # name of a file that only folders of this kind hold; empty where nothing is ever replaced

    def __init__(self, out: Path, force: bool):
        try:
            self.out, self.force = out.resolve(), force  # a link stays a link: what it leads to is replaced
        except (OSError, RuntimeError) as error:  # RuntimeError: before Python 3.13
            raise InputError(f"{out} is a link that leads back to itself: name another folder with --out.") from error
        self.folder = self._beside("partial", os.getpid())
        self._lock: BaseFileLock | None = None  # stays None where the file system has no locks

    def _beside(self, kind: str, pid: int) -> Path:
        return self.out.parent / f".{self.out.name}.{kind}-{pid}"

    def owns(self, folder: Path) -> bool:
        """Whether a folder is complete and was written by the same command."""
        return (folder / self.mark).is_file()

    def check(self) -> None:
        """Raise InputError where `out` must not be replaced."""
        raise NotImplementedError

    def tell(self) -> None:
        """Log what is lost with the folder that is replaced."""

    def prepare(self) -> None:
        """Clean up after killed processes, then `refuse`."""
        self.recover()
        self.refuse()

    def refuse(self) -> None:
        """Raise where the work would be lost at its end; changes nothing, so that it can be asked before any work.

        InputError for another process that writes to `out`, for a mount point, and as `check` does; FusionError where
        this user cannot write.
        """
        for pid in sorted(self._pids() - {os.getpid()}):
            lock = self._beside("lock", pid)
            if lock.is_file() and files.held(lock):  # asking for a lock would make the file
                raise InputError(
                    f"Process {pid} is writing to {self.out} already: wait for it or end it, or name another folder with --out."
                )
        if self.out.is_mount():
            raise InputError(f"{self.out} is a mount point, which no folder can replace: name a folder below it with --out.")
        above = next(folder for folder in self.out.parents if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise self._unwritable("Permission denied" if above.is_dir() else "Not a directory")
        self.check()

    def _unwritable(self, reason: str) -> FusionError:
        return FusionError(f"Cannot write to {self.out.parent} ({reason}): name a folder you may write to with --out.")

    def __enter__(self) -> Self:
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.recover()
            self._lock = files.lock_file(self._beside("lock", os.getpid()))
            if self._lock is not None:
                self._lock.acquire(timeout=0)
            self.refuse()  # under the lock: of two processes that start at once none goes on unseen
            self.folder.mkdir()
        except BaseException as error:
            self._release()
            if isinstance(error, OSError):
                raise self._unwritable(error.strerror or one_line(error)) from error
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._replace()
        finally:
            remove(self.folder)
            self._release()

    def _release(self) -> None:
        if self._lock is not None and self._lock.is_locked:
            self._lock.release()
            with contextlib.suppress(OSError):
                Path(self._lock.lock_file).unlink(missing_ok=True)

    def recover(self) -> None:
        """Remove half-written folders of killed processes, and bring back an old folder that was not yet replaced."""
        for pid in self._pids():
            lock = files.lock_file(self._beside("lock", pid))
            if lock is None:  # without locks nobody knows whether its process runs: a leftover is the lesser harm
                return
            try:
                lock.acquire(timeout=0)
            except OSError:  # its process runs
                continue
            try:
                old = self._beside("replaced", pid)
                if old.exists() and not self.owns(self.out):
                    with contextlib.suppress(OSError):  # other files stand in its place: `check` says so
                        old.rename(self.out)
                else:
                    shutil.rmtree(old, ignore_errors=True)
                shutil.rmtree(self._beside("partial", pid), ignore_errors=True)
            finally:
                lock.release()
                with contextlib.suppress(OSError):
                    Path(lock.lock_file).unlink(missing_ok=True)

    def _pids(self) -> set[int]:
        """The processes that have, or have left, something beside `out`."""
        pids = set()
        for path in self.out.parent.glob(f".{self.out.name}.*-*"):
            kind, _, pid = path.name.removeprefix(f".{self.out.name}.").partition("-")
            if kind in ("partial", "replaced", "lock") and pid.isdecimal():
                pids.add(int(pid))
        return pids

    def _replace(self) -> None:
        """Let the complete folder take the place of an old one, which comes back where that fails."""
        self.check()  # something may have appeared there while we worked
        self.tell()
        if self.out.exists() and files.exchange(self.folder, self.out):
            return  # the old one has our folder's name now
        old = self._beside("replaced", os.getpid())
        try:
            if self.out.exists():
                self.out.rename(old)
            self.folder.rename(self.out)
        finally:
            if old.exists() and not self.out.exists():
                old.rename(self.out)
        remove(old)


def remove(folder: Path) -> None:
    """Remove a folder if there is one; what cannot be removed is told in the log."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        LOG.warning("%s cannot be removed (%s): remove it by hand, or export to the same place again.", folder, reason(error))


class StagedBundle(Staging):
    """The folder of a bundle. With `force` it replaces a bundle and nothing else."""

    mark = NAME

    def owns(self, folder: Path) -> bool:
        """Whether a folder is a bundle: other tools write a manifest.json too."""
        with contextlib.suppress(InputError):
            return bundled(folder) is not None
        return False

    def check(self) -> None:
        """Raise InputError for all but an empty folder and, with `force`, a bundle without files of the user's."""
        if not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir())):
            return
        listed = bundled(self.out)
        if listed is None:
            raise InputError(f"{self.out} exists and is no bundle, so it is not replaced: name another folder with --out.")
        if not self.force:
            raise InputError(f"A bundle exists at {self.out}: add --force to replace it, or name another folder with --out.")
        for path in sorted(self.out.rglob("*")):
            ours = path.relative_to(self.out).as_posix() in listed or is_leftover(path, self.out)
            if not ours and not (path.is_dir() and not path.is_symlink()):
                raise InputError(f"{path} is no part of the bundle that --force replaces: move it away, or name another folder with --out.")

    def tell(self) -> None:
        """Log that the bundle at `out` was signed, if so, since the new one is not."""
        if (self.out / SIGNATURE).exists():
            LOG.warning("The bundle that was at %s was signed, and this one is not: sign it with `fusionroute sign`.", self.out)


def bundled(folder: Path) -> set[str] | None:
    """The files of a bundle of any version, as its manifest lists them. None where the folder is no bundle.

    Raises InputError where it may be one, and cannot be read now.
    """
    try:
        manifest = json.loads(read_regular(folder, NAME, MOST_BYTES))
        return {NAME, SIGNATURE, *manifest["files"]} if {"format", "family", "models"} <= manifest.keys() else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    except OSError as error:
        if error.errno in NO_MANIFEST:
            return None
        raise InputError(
            f"{folder / NAME} cannot be read now ({reason(error)}), so {folder} is not replaced: mend that, or name another folder with --out."
        ) from error
