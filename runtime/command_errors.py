"""How every command ends: errors in one sentence on stderr, and an exit status that says whether the usage was wrong.

Status 0: done. 2: wrong usage. 1: anything else, Ctrl-C included. 143: SIGTERM. 129: SIGHUP.
"""

import errno
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import typer

from fusionroute.runtime.errors import FusionError, one_line, printable

MISSING = "This needs the package '{0}': install it (pip install {0})."


def fail(reason: Exception | str, debug: bool = False) -> NoReturn:
    """Print one sentence on one line of stderr, below the traceback if `debug`; raises typer.Exit(1)."""
    if debug:
        traceback.print_exc()
    print(f"error: {printable(one_line(reason) if isinstance(reason, Exception) else reason)}", file=sys.stderr)
    raise typer.Exit(1)


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block with SystemExit, and Ctrl-C with KeyboardInterrupt: half-written files are removed.

    Libraries turn an end in the middle of their work into errors of their own (an extension module that is being
    imported: ImportError; torch: ValueError). A signal that is ignored, as by nohup, stays ignored.
    """
    ends: list[BaseException] = []

    def end(number: int, *_: object) -> None:
        ends.append(KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number))
        raise ends[-1]

    names = ("SIGTERM", "SIGHUP", "SIGINT")  # Windows has no SIGHUP
    numbers = [number for name in names if (number := getattr(signal, name, None)) and signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    except Exception as error:
        if ends:
            raise ends[-1] from error
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)


@contextmanager
def one_sentence(
    what: str, missing: str = MISSING, out: Path | None = None, left: str = "", debug: bool = False, interrupted: str = ""
) -> Iterator[None]:
    """End every error of a command in one sentence and exit status 1.

    Wrong usage keeps status 2. A reader of stdout that has left ends the command silently. Blocks may be nested: the
    inner one speaks.

    what: what failed, as a noun ("export").
    missing: what to install; {} stands for the package that cannot be imported.
    out: where the command writes.
    left: what remains of the work; interrupted: the same after Ctrl-C, where that differs.
    """
    rest = f"; {left}" if left else ""
    try:
        with terminable():
            yield
    except (typer.BadParameter, typer.Exit, typer.Abort, BrokenPipeError):  # typer ends these itself
        raise
    except FusionError as error:
        fail(error, debug)
    except ModuleNotFoundError as error:
        fail(missing.format(error.name), debug)
    except KeyboardInterrupt:
        remains = interrupted or left
        fail(f"Interrupted{f'; {remains}' if remains else ''}.", debug)
    except OSError as error:
        place = error.filename or out
        mend = "make room, or name another disk with --out" if out else "make room"
        room = f": {mend}" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        fail(f"The {what} failed{f' on {place}' if place else ''} ({error.strerror or one_line(error)}){room}{rest}.", debug)
    except Exception as error:  # a fault of the program or of a library, not of the input
        fail(f"The {what} failed unexpectedly ({type(error).__name__}: {one_line(error)}){rest}. --debug shows where.", debug)
