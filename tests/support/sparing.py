"""Parameters of tests of which some run with `-m slow` only: every trace costs seconds."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def sparing(names: Iterable[str], slow: Collection[str]) -> list[Any]:
    """The names, those of `slow` marked so."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]
