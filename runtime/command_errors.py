"""How the command lines end: in one sentence on stderr, with a status that says whether the usage was wrong."""

import errno
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from fusionroute.runtime.errors import FusionError, one_line


def fail(reason: Exception | str, debug: bool) -> None:
    """One sentence on one line of stderr, and exit status 1."""
    if debug:
        traceback.print_exc()
    print(f"error: {one_line(reason) if isinstance(reason, Exception) else reason}", file=sys.stderr)
    raise typer.Exit(1)


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends the block with SystemExit(143), so that what is half-written is removed.

    Libraries turn an exit in the middle of their work into errors of their own (an extension module that is being imported: ImportError).
    """
    told = []

    def terminate(*_: object) -> None:
        told.append(True)
        sys.exit(143)

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except Exception as error:
        if told:
            raise SystemExit(143) from error
        raise


@contextmanager
def one_sentence(what: str, missing: str, out: Path, left: str, debug: bool, interrupted: str = "") -> Iterator[None]:
    """Let every error of a command end in one sentence and exit status 1; wrong usage keeps status 2, SIGTERM means 143.

    `what` the command does ("export"); `missing` says what to install, {} being the package that is not there; `left` says what remains
    of the work, `interrupted` the same after Ctrl-C where that differs.
    """
    rest = f"; {left}" if left else ""
    try:
        with terminable():
            yield
    except (typer.BadParameter, BrokenPipeError):  # wrong usage, and a reader of stdout that has left: typer knows how to end
        raise
    except FusionError as error:
        fail(error, debug)
    except ModuleNotFoundError as error:
        fail(missing.format(error.name), debug)
    except KeyboardInterrupt:
        fail(f"Interrupted; {interrupted or left}.", debug)
    except OSError as error:
        room = ": make room, or name another disk with --out" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        fail(f"The {what} failed on {error.filename or out} ({error.strerror or one_line(error)}){room}{rest}.", debug)
    except Exception as error:  # a fault of the program or of a library, not of the input
        fail(f"The {what} failed unexpectedly ({type(error).__name__}: {one_line(error)}){rest}. --debug shows where.", debug)
