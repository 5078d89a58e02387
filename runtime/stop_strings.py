"""Stop strings in a text: where they start, and where one may have begun."""

from collections.abc import Sequence
from itertools import islice


def met(text: str, stops: Sequence[str]) -> list[int]:
    """Where each stop string starts, of those that there are."""
    return [place for string in stops if (place := text.find(string)) >= 0]


def begun(text: str, stops: Sequence[str]) -> list[int]:
    """The first place from which on a text is the beginning of a stop string, and may become one; none or one."""
    longest = max(map(len, stops), default=0)
    tails = range(max(len(text) - longest + 1, 0), len(text))
    return list(islice((place for place in tails if any(string.startswith(text[place:]) for string in stops)), 1))
