"""The log of a long job (`--log FILE`): when it did what, with which versions, and the traceback if it failed."""

import os
import platform
import shlex
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TextIO

from fusionroute.runtime import __version__
from fusionroute.runtime.errors import InputError, one_line

PACKAGES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu", "tensorrt-rtx", "numpy", "peft")


class Log:
    """A text file that grows line by line, so that it can be followed while the job runs and outlives a killed one."""

    def __init__(self, file: TextIO | None = None):
        self._file = file

    def line(self, text: str) -> None:
        """Append lines, each with the time; nothing without a file."""
        if self._file is not None:
            now = datetime.now().astimezone().isoformat(timespec="milliseconds")
            self._file.writelines(f"{now}  {line}\n" for line in text.splitlines())
            self._file.flush()


@contextmanager
def logging_to(path: Path | None, out: Path) -> Iterator[Log]:
    """A log in the file `path`, which is overwritten; None: a log that keeps nothing. An error is logged as it leaves.

    Raises InputError where the file lies in the folder `out`, which appears only at the end, or cannot be written.
    """
    if path is None:
        yield Log()
        return
    if path.resolve().is_relative_to(out.resolve()):
        raise InputError(f"The log {path} would lie in the folder that is written ({out}): name a file outside of it with --log.")
    try:
        file = path.open("w", encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"The log {path} cannot be written ({error.strerror or one_line(error)}): name another file with --log."
        ) from error
    with file:
        log = Log(file)
        for line in header():
            log.line(line)
        try:
            yield log
        except BaseException:
            log.line(traceback.format_exc())
            raise
        log.line("done")


def header() -> list[str]:
    """What the job is: the command line, the versions, and the machine."""
    versions = [f"fusionroute {__version__}", f"python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return [shlex.join(sys.argv), ", ".join(versions), f"{platform.platform()}, {os.cpu_count()} cores, process {os.getpid()}"]
