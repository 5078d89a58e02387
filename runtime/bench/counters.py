"""Switches and catch-ups, counted from the experts of a text's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def switches(experts: Sequence[str]) -> int:
    """How many tokens came from another expert than the token before."""
    return sum(before != after for before, after in pairwise(experts))


def catch_ups(experts: Sequence[str], prompt: int) -> list[int]:
    """How many tokens an expert read at once, for every token after the first for which it had more than one to read.

    The first token is left out: its expert reads the prompt, which is part of the time to the first token.
    """
    read: dict[str, int] = {}
    lengths = []
    for number, expert in enumerate(experts):
        lengths.append(prompt + number - read.get(expert, 0))
        read[expert] = prompt + number
    return [length for length in lengths[1:] if length > 1]
