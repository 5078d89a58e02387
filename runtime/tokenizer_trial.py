"""A tokenizer is tried in a process of its own before this one reads it: whatever it does there costs only that process."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from fusionroute.runtime import tokenizer_limits
from fusionroute.runtime.errors import BundleError
from fusionroute.runtime.regular_files import Identity, identity

SECONDS = 60  # that a trial may take; the largest vocabularies take two
MEMORY = 2 << 30  # bytes, and 64 for each of the file: the library keeps several maps of the vocabulary


class Trial:
    """A process that tries one tokenizer. With `begin` it does so while its caller goes on.

    Where there is no interpreter to start, as in programs that embed one, nothing is tried.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._reads: Identity | None = None

    def begin(self, file: BinaryIO) -> None:
        """Start the process, which reads an open tokenizer.json by itself. Raises nothing."""
        self._reads = identity(file)
        self._start(file)

    def decide(self, content: bytes, path: Path, file: Identity | None = None) -> None:
        """Raise BundleError for a tokenizer.json that is not bounded, or that cannot be read within limits. path: where it is.

        file: the one whose content it is, if the process may have begun with it.
        """
        if file is None or file != self._reads:
            self.end()
        reason = self._reason(content)
        if reason is not None:
            raise BundleError(f"{path} cannot be read as a tokenizer.json ({reason}); export the bundle again.")

    def end(self) -> None:
        """End the process, whatever it does. It may not have begun."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _start(self, source: BinaryIO | int) -> None:
        interpreter = Path(sys.executable or "")
        if interpreter.name.startswith("python"):
            command = [str(interpreter), "-I", tokenizer_limits.__file__, str(MEMORY)]
            with suppress(OSError):  # no more processes, or none allowed
                self._process = subprocess.Popen(command, stdin=source, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def _reason(self, content: bytes) -> str | None:
        """Why a tokenizer.json is refused."""
        given = None if self._process else content
        if self._process is None:
            self._start(subprocess.PIPE)
        if self._process is None:
            return tokenizer_limits.unbounded(content)
        try:
            said = self._process.communicate(given, timeout=SECONDS)[0].decode(errors="replace").strip()
        except subprocess.TimeoutExpired:
            return f"reading it takes more than {SECONDS} seconds"
        return None if self._process.returncode == 0 else said or "reading it takes more memory than it may, or ends the process"


def try_tokenizer(content: bytes, path: Path) -> None:
    """A whole trial. Raises as `Trial.decide` does."""
    trial = Trial()
    try:
        trial.decide(content, path)
    finally:
        trial.end()
