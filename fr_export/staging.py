"""A folder that appears under its name only when it is complete: written beside, then renamed."""

import os
import shutil
from pathlib import Path
from types import TracebackType

from runtime.errors import FusionError, InputError
from runtime.manifest import NAME


class Staging:
    """Context manager: write into `.folder`; leaving it without an error moves that to `out`, with one it removes it.

    An existing bundle is replaced only with `force`, after the new one is complete. Raises InputError where `out` is something else.
    """

    def __init__(self, out: Path, force: bool):
        self.out, self.force = out.absolute(), force
        self.folder = self._beside("partial")

    def _beside(self, kind: str) -> Path:
        return self.out.parent / f".{self.out.name}.{kind}-{os.getpid()}"

    def __enter__(self) -> "Staging":
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._recover()
            self.check()
            self.folder.mkdir()
        except OSError as error:
            raise FusionError(
                f"Cannot write to {self.out.parent} ({error.strerror}): name a folder you may write to with --out."
            ) from error
        return self

    def check(self) -> None:
        """Refuse to touch what is not ours to replace."""
        if not (self.out.exists() or self.out.is_symlink()):
            return
        if not self.out.is_dir() or (any(self.out.iterdir()) and not (self.out / NAME).is_file()):
            raise InputError(f"{self.out} exists and is no bundle, so it is not replaced: name another folder with --out.")
        if not self.force:
            raise InputError(f"A bundle exists at {self.out}: add --force to replace it, or name another folder with --out.")

    def _recover(self) -> None:
        """Clear what a killed export left: its half-written folder, or an old bundle it had moved aside but not yet replaced."""
        for path in self.out.parent.glob(f".{self.out.name}.*-*"):
            kind, _, pid = path.name.removeprefix(f".{self.out.name}.").partition("-")
            if kind not in ("partial", "replaced") or not pid.isdigit() or alive(int(pid)):
                continue
            if kind == "replaced" and not self.out.exists():
                path.rename(self.out)
            else:
                shutil.rmtree(path, ignore_errors=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        old = self._beside("replaced")
        if self.out.exists():
            self.check()  # it may have appeared while we worked
            self.out.rename(old)
        self.folder.rename(self.out)
        shutil.rmtree(old, ignore_errors=True)


def alive(pid: int) -> bool:
    """Whether a process with this id runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
