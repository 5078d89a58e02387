"""A tokenizer is tried in a process of its own before this one reads it: whatever it does there costs only that process."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from fusionroute.runtime import tokenizer_limits
from fusionroute.runtime.errors import BundleError

SECONDS = 60  # that a trial may take; the largest vocabularies take two
MEMORY = 2 << 30  # bytes, and 64 for each of the file: the library keeps several maps of the vocabulary


class Trial:
    """A process that tries one tokenizer. It starts with `begin`, and imports the library while its caller goes on.

    Where there is no interpreter to start, as in programs that embed one, nothing is tried.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def begin(self) -> None:
        """Start the process, unless it runs already. Raises nothing."""
        interpreter = Path(sys.executable or "")
        if self._process is None and interpreter.name.startswith("python"):
            command = [str(interpreter), "-I", tokenizer_limits.__file__, str(MEMORY)]
            with suppress(OSError):  # no more processes, or none allowed
                self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def decide(self, content: bytes, path: Path) -> None:
        """Raise BundleError for a tokenizer.json that is not bounded, or that cannot be read within limits. path: where it is."""
        self.begin()
        reason = tokenizer_limits.unbounded(content) if self._process is None else self._said(self._process, content)
        if reason is not None:
            raise BundleError(f"{path} cannot be read as a tokenizer.json ({reason}); export the bundle again.")

    def end(self) -> None:
        """End the process, whatever it does. It may not have begun."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _said(self, process: subprocess.Popen[bytes], content: bytes) -> str | None:
        """Why a tokenizer.json is refused."""
        try:
            said = process.communicate(content, timeout=SECONDS)[0].decode(errors="replace").strip()
        except subprocess.TimeoutExpired:
            return f"reading it takes more than {SECONDS} seconds"
        return None if process.returncode == 0 else said or "reading it takes more memory than it may, or ends the process"


def try_tokenizer(content: bytes, path: Path) -> None:
    """A whole trial. Raises as `Trial.decide` does."""
    trial = Trial()
    try:
        trial.decide(content, path)
    finally:
        trial.end()
