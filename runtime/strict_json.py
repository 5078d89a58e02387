"""JSON that says each thing once: what readers could understand in two ways is refused, and what could exhaust them."""

from __future__ import annotations

import json
from typing import Any, NoReturn

DIGITS = 40  # of a number; 64-bit integers have 19


def check_json(content: str | bytes) -> None:
    """Raise ValueError for what is no JSON, for a key that stands twice in one object, NaN, numbers of many digits, and
    for nesting that no reader follows.
    """
    try:
        json.loads(content, object_pairs_hook=_distinct, parse_constant=_no_constant, parse_int=_short, parse_float=_short)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def why_no_json(line: str, error: ValueError) -> str:
    """Where a line, such as one of many in a file, is no JSON: a part of a sentence."""
    place = error.pos if isinstance(error, json.JSONDecodeError) else 0
    rest = line[place:].strip()
    begin = repr(rest if len(rest) <= DIGITS else f"{rest[:DIGITS]}…")
    if not rest:
        return "it ends too early"
    return f"it begins with {begin}" if not line[:place].strip() else f"it goes on with {begin} behind {place} characters"


def _distinct(pairs: list[tuple[str, Any]]) -> None:
    keys = set()
    for key, _ in pairs:
        if key in keys:
            raise ValueError(f"the key {key[:DIGITS]!r} stands twice")
        keys.add(key)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _short(digits: str) -> None:
    if len(digits) > DIGITS:
        raise ValueError(f"it has a number of {len(digits)} digits")
