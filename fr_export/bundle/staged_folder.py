"""A folder that appears under its name only when it is complete: written beside, then renamed."""

import contextlib
import fcntl
import json
import os
import shutil
from pathlib import Path
from types import TracebackType

from fusionroute.runtime.errors import FusionError, InputError
from fusionroute.runtime.manifest import NAME


class Staging:
    """Context manager: write into `.folder`; leaving it without an error moves that to `out`, with one it removes it.

    An existing bundle is replaced only with `force`, after the new one is complete. Raises InputError where `out` is something else.
    The folder stays locked while it is written, so that what a killed export left is told from what another one is writing.
    """

    def __init__(self, out: Path, force: bool):
        self.out, self.force = out.resolve(), force  # a link stays a link: what it leads to is replaced
        self.folder = self._beside("partial", os.getpid())

    def _beside(self, kind: str, pid: int) -> Path:
        return self.out.parent / f".{self.out.name}.{kind}-{pid}"

    def __enter__(self) -> "Staging":
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.recover()
            self.check()
            self.folder.mkdir()
            self._lock = os.open(self.folder, os.O_RDONLY)
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(self._lock, fcntl.LOCK_EX)
        except OSError as error:
            raise FusionError(
                f"Cannot write to {self.out.parent} ({error.strerror}): name a folder you may write to with --out."
            ) from error
        return self

    def check(self) -> None:
        """Refuse to touch what is not ours to replace: all but an empty folder and, with `force`, a bundle and nothing else."""
        if not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir())):
            return
        files = bundled(self.out)
        if files is None:
            raise InputError(f"{self.out} exists and is no bundle, so it is not replaced: name another folder with --out.")
        if not self.force:
            raise InputError(f"A bundle exists at {self.out}: add --force to replace it, or name another folder with --out.")
        for path in sorted(self.out.rglob("*")):
            if path.relative_to(self.out).as_posix() not in files and not (path.is_dir() and not path.is_symlink()):
                raise InputError(f"{path} is no part of the bundle that --force replaces: move it away, or name another folder with --out.")

    def complete(self) -> bool:
        """Whether a folder of the kind that is written here stands at `out`."""
        return bundled(self.out) is not None

    def recover(self) -> None:
        """Clear what a killed process left: its half-written folder, or an old one that it had moved aside but not yet replaced."""
        for path in self.out.parent.glob(f".{self.out.name}.*-*"):
            kind, _, pid = path.name.removeprefix(f".{self.out.name}.").partition("-")
            if kind not in ("partial", "replaced") or not pid.isdecimal() or locked(self._beside("partial", int(pid))):
                continue
            if kind == "replaced" and not self.complete():
                with contextlib.suppress(OSError):  # files that are not ours stand in its place: `check` says so
                    path.rename(self.out)
            else:
                shutil.rmtree(path, ignore_errors=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._replace()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock)

    def _replace(self) -> None:
        """Let the complete folder take the place of an old one, which comes back where that fails."""
        self.check()  # something may have appeared there while we worked
        old = self._beside("replaced", os.getpid())
        try:
            if self.out.exists():
                self.out.rename(old)
            self.folder.rename(self.out)
        finally:
            if old.exists() and not self.out.exists():
                old.rename(self.out)
        shutil.rmtree(old, ignore_errors=True)


def bundled(folder: Path) -> set[str] | None:
    """The files that belong to a bundle of any version, as its manifest lists them; None where the folder is no bundle."""
    try:
        manifest = json.loads((folder / NAME).read_text(encoding="utf-8"))
        return {NAME, *manifest["files"]} if {"format", "family", "models"} <= manifest.keys() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def locked(folder: Path) -> bool:
    """Whether an export that still runs holds a folder."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks: better to leave a folder behind than to take one away
        return True
    finally:
        os.close(handle)
    return False
