"""The folder that training writes, and the folder that it works in until then."""

import json
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from fusionroute.fr_export.bundle.staged_folder import Staging
from fusionroute.runtime.errors import InputError

TRAINING_FILE = "training.json"  # its presence says that a folder was written by this tool


class RouterStaging(Staging):
    """A trained router's folder, which appears only when complete.

    `force` replaces one that this tool has written before.
    """

    mark = TRAINING_FILE

    def check(self) -> None:
        """Raise InputError unless `out` is missing or empty or, with `force`, a router that was trained here."""
        if not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir())):
            return
        if not self.owns(self.out):
            raise InputError(
                f"{self.out} exists and is no router that was trained here, so it is not replaced: name another folder with --out."
            )
        if not self.force:
            raise InputError(f"A trained router exists at {self.out}: add --force to replace it, or name another folder with --out.")


class Work:
    """`OUT.unfinished`: checkpoints and finished stages, so that an interrupted run can be resumed.

    It is removed at the end, after an error too; with `keep` only when the run is done. `identity` says what goes into
    the run: `resume` takes up a run of the same identity only. Only the `writer` among the ranks makes and removes the
    folder. Raises InputError where the folder holds something else than `resume` and `force` allow for.
    """

    def __init__(self, out: Path, identity: dict[str, Any], *, keep: bool, resume: bool, force: bool, writer: bool) -> None:
        self.folder = out.parent / f"{out.name}.unfinished"
        self._file = self.folder / "run.json"
        self._identity, self._keep, self._writer = json.loads(json.dumps(identity)), keep, writer
        if resume:
            self._match()
        elif self._file.is_file() and not force:
            raise InputError(f"An interrupted run exists at {self.folder}: add --resume to go on with it, or --force to start anew.")
        elif self.folder.exists() and not self._file.is_file() and any(self.folder.iterdir()):
            raise InputError(f"{self.folder} exists and is no interrupted run: move it away, or name another folder with --out.")
        self._resume = resume

    def _match(self) -> None:
        try:
            interrupted = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"There is no interrupted run at {self.folder} to resume: leave out --resume.") from error
        differing = [name for name in self._identity if interrupted.get(name) != self._identity[name]]
        if differing:
            raise InputError(
                f"The interrupted run at {self.folder} had other settings ({', '.join(differing)}): resume it with the same ones."
            )

    def __enter__(self) -> "Work":
        if self._writer:
            if not self._resume:
                shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file.write_text(json.dumps(self._identity, indent=1), encoding="utf-8")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._writer and (kind is None or not self._keep):
            shutil.rmtree(self.folder, ignore_errors=True)

    def checkpoint(self, stage: Path) -> str | None:
        """The newest complete checkpoint in a stage's folder, to resume from; None to begin the stage."""
        complete = [path.parent for path in stage.glob("checkpoint-*/trainer_state.json")]  # the Trainer writes it last
        return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if self._resume and complete else None
