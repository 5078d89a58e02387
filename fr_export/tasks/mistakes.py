"""Wrong answers that look right: the rejected side of the shipped systems' preference data."""

import random
import re
from collections.abc import Callable

from fusionroute.fr_export.tasks.domains import Sample
from fusionroute.fr_export.tasks.generators import LETTERS, WORDS

_ITEM = re.compile(r"\w+")


def mistake(sample: Sample, rng: random.Random) -> str:
    """The sample's answer with one thing wrong.

    A digit, a word or a letter is changed, two items are swapped, or the last one is left out.
    """
    while True:
        changed = rng.choice(_KINDS)(sample.answer, rng)
        if changed and changed != sample.answer:
            return changed


def _other_item(text: str, rng: random.Random) -> str:
    """One number, word or letter becomes another of its kind."""
    match = rng.choice(list(_ITEM.finditer(text)))
    item = match[0]
    if item.isdigit():
        place = rng.randrange(len(item))
        new = item[:place] + str((int(item[place]) + rng.choice((1, 2, 8, 9))) % 10) + item[place + 1 :]
    elif item.lower() in WORDS:
        new = rng.choice(WORDS).upper() if item.isupper() else rng.choice(WORDS)
    elif len(item) == 1:
        new = rng.choice(LETTERS)
    else:
        return text
    return text[: match.start()] + new + text[match.end() :]


def swapped(text: str, rng: random.Random) -> str:
    """Two neighbouring items change places."""
    items = list(_ITEM.finditer(text))
    if len(items) < 2:
        return text
    at = rng.randrange(len(items) - 1)
    a, b = items[at], items[at + 1]
    return text[: a.start()] + b[0] + text[a.end() : b.start()] + a[0] + text[b.end() :]


def _shortened(text: str, rng: random.Random) -> str:
    """The last item, and the text between it and the item before, is left out."""
    items = list(_ITEM.finditer(text))
    return text if len(items) < 2 else text[: items[-2].end()] + text[items[-1].end() :]


_KINDS: tuple[Callable[[str, random.Random], str], ...] = (_other_item, _other_item, swapped, _shortened)
