"""A tokenizer is tried in a process of its own before this one reads it: whatever it does there costs only that process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fusionroute.runtime import tokenizer_limits
from fusionroute.runtime.errors import BundleError

SECONDS = 60  # that a trial may take; the largest vocabularies take two
MEMORY = 2 << 30  # bytes, and 64 for each of the file: the library keeps several maps of the vocabulary


def try_tokenizer(content: bytes, path: Path) -> None:
    """Raise BundleError for a tokenizer.json that is not bounded, or that cannot be read within limits.

    path: where it is. Where there is no interpreter to start, as in programs that embed one, nothing is tried.
    """
    interpreter = Path(sys.executable or "")
    reason = tried(interpreter, content) if interpreter.name.startswith("python") else tokenizer_limits.unbounded(content)
    if reason is not None:
        raise BundleError(f"{path} cannot be read as a tokenizer.json ({reason}); export the bundle again.")


def tried(interpreter: Path, content: bytes) -> str | None:
    """Why a tokenizer.json is refused."""
    command = [str(interpreter), "-I", tokenizer_limits.__file__, str(MEMORY + 64 * len(content))]
    try:
        ended = subprocess.run(command, input=content, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"reading it takes more than {SECONDS} seconds"
    except OSError:  # no more processes, or none allowed
        return tokenizer_limits.unbounded(content)
    said = ended.stdout.decode(errors="replace").strip()
    return None if ended.returncode == 0 else said or "reading it takes more memory than it may, or ends the process"
