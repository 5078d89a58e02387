"""Arguments of callers without a type checker: each is what it should be, or refused in one sentence. Nothing is
converted that could be meant otherwise: a bool is no number, bytes are no token ids.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from numbers import Integral, Real
from operator import index
from pathlib import Path

import numpy as np

from fusionroute.runtime.errors import InputError

LONGEST = 60  # characters of a value in a sentence
UNORDERED_OR_TEXT = (str, bytes, bytearray, memoryview, dict, set, frozenset)


def shown(value: object) -> str:
    """A value for a sentence: its beginning, or its type where it cannot be written."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # such as an integer of more digits than Python writes
        text = f"<{type(value).__name__}>"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def check_names(options: Iterable[str], known: Sequence[str]) -> None:
    """Raise InputError for keyword arguments that are not among the known ones."""
    for name in options:
        if name not in known:
            near = get_close_matches(name, known, 1)
            meant = f" ({near[0]}?)" if near else ""
            raise InputError(f"Unknown option {name[:LONGEST]}{meant}: expected some of {', '.join(known)}.")


def real(name: str, value: object, expected: str = "a number") -> float:
    """A finite or infinite number. Raises InputError, also for NaN and for what lies beyond a float."""
    number = math.nan
    if not isinstance(value, bool) and isinstance(value, Real):
        try:
            number = float(value)
        except OverflowError:
            number = math.nan
    if math.isnan(number):
        raise InputError(f"{name} is {shown(value)}, expected {expected}.")
    return number


def whole(name: str, value: object, least: int | None = None) -> int:
    """A whole number, of at least `least`. Raises InputError."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InputError(f"{name} is {shown(value)}, expected a whole number.")
    if least is not None and value < least:
        raise InputError(f"{name}={shown(value)} is out of range: expected at least {least}.")
    return int(value)


def flag(name: str, value: object) -> bool:
    """True or False. Raises InputError for all else."""
    if not isinstance(value, (bool, np.bool_)):
        raise InputError(f"{name} is {shown(value)}, expected True or False.")
    return bool(value)


def text(name: str, value: object) -> str:
    """A str. Raises InputError."""
    if not isinstance(value, str):
        raise InputError(f"{name} is {shown(value)}, expected a str.")
    return value


def path(name: str, value: object) -> Path:
    """A path. Raises InputError."""
    if not isinstance(value, (str, Path)) or "\0" in str(value):
        raise InputError(f"{name} is {shown(value)}, expected a path.")
    return Path(value)


def token_ids(values: object) -> list[int]:
    """Token ids in an order. Raises InputError, also for bytes, sets and bools."""
    return whole_numbers(values, "token ids", "pass ids as `encode` gives them")


def whole_numbers(values: object, what: str, mend: str = "pass a list of them") -> list[int]:
    """A list of whole numbers, from anything that has them in an order. Raises InputError."""
    refused = InputError(f"The {what} are not all whole numbers: {mend}.")
    if isinstance(values, UNORDERED_OR_TEXT) or not isinstance(values, Iterable):
        raise refused
    numbers = list(values)
    if any(isinstance(each, (bool, np.bool_)) for each in numbers):
        raise refused
    try:
        return [index(each) for each in numbers]
    except TypeError as error:
        raise refused from error
