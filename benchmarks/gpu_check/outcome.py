"""The result of a check: passed, failed or skipped, with one sentence and the figures behind it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from fusionroute.runtime.errors import FusionError, one_line

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


class Finding(NamedTuple):
    """What a check returns: whether it passed, one sentence for people, and the figures behind the sentence."""

    passed: bool
    says: str
    figures: dict[str, Any]


class Skipped(Exception):
    """A check that cannot run here; the message says why."""


@dataclass(frozen=True)
class Outcome:
    """One row of the report."""

    check: str
    subject: str
    status: str
    says: str
    figures: dict[str, Any] = field(default_factory=dict)


class Limit(Protocol):
    """What ends a check in time."""

    def limit(self) -> AbstractContextManager[None]:
        """Raises Skipped within when the time is over."""
        ...


def run_check(name: str, subject: str, check: Callable[[], Finding], budget: Limit) -> Outcome:
    """Run a check. `Skipped` and a missing package give a skipped outcome; any other error is a failure of this check
    and stops no other.
    """
    try:
        with budget.limit():
            finding = check()
    except Skipped as reason:
        return Outcome(name, subject, SKIPPED, str(reason))
    except ModuleNotFoundError as error:
        return Outcome(name, subject, SKIPPED, f"it needs the package {error.name}, which is not installed here")
    except Exception as error:
        says = str(error) if isinstance(error, FusionError) else f"{type(error).__name__}: {one_line(error)}"
        return Outcome(name, subject, FAILED, says)
    return Outcome(name, subject, PASSED if finding.passed else FAILED, finding.says, finding.figures)
