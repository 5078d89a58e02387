"""Wrong answers that look right: the rejected side of the preferences."""

import random
import re

from benchmarks.real_system.tasks import Task
from fusionroute.fr_export.tasks.mistakes import swapped

_ITEM = re.compile(r"\w+")
_TRIES = 20


def mistake(task: Task, rng: random.Random) -> str | None:
    """The task's answer with one thing wrong that its check notices. None where no try gives one: any fruit is right."""
    for _ in range(_TRIES):
        wrong = rng.choice((_digit, _digit, swapped, _shortened, _case, _mark))(task.answer, rng)
        if wrong.strip() and wrong != task.answer and not task.right(wrong):
            return wrong
    return None


def _digit(text: str, rng: random.Random) -> str:
    """One digit becomes another."""
    places = [at for at, sign in enumerate(text) if sign.isdigit()]
    if not places:
        return text
    at = rng.choice(places)
    return text[:at] + str((int(text[at]) + rng.choice((1, 2, 8, 9))) % 10) + text[at + 1 :]


def _shortened(text: str, rng: random.Random) -> str:
    """The end is missing from some word on."""
    items = list(_ITEM.finditer(text))
    return text[: rng.choice(items[1:]).start()].rstrip() if len(items) > 1 else text


def _case(text: str, rng: random.Random) -> str:
    """One word changes its case."""
    match = rng.choice(list(_ITEM.finditer(text)) or [None])
    return text if match is None else text[: match.start()] + match[0].swapcase() + text[match.end() :]


def _mark(text: str, rng: random.Random) -> str:
    """One mark is left out or becomes another."""
    places = [at for at, sign in enumerate(text) if not (sign.isalnum() or sign.isspace())]
    if not places:
        return text
    at = rng.choice(places)
    return text[:at] + rng.choice(("", ",", ".", ":", ")")) + text[at + 1 :]
