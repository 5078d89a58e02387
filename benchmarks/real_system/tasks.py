"""One prompt, an answer that is right, and the check that says whether another answer is right too."""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "validation", "test"]
_SHARES: dict[int, Split] = {0: "test", 1: "test", 2: "validation"}  # of twenty equal shares; the others are for training


@dataclass(frozen=True)
class Task:
    """A prompt with the answer to learn. `right` tells whether an answer counts; `unit` decides the split.

    Tasks of one unit, such as the lines of one source file, are never in two splits.
    """

    prompt: str
    answer: str
    domain: str
    right: Callable[[str], bool]
    unit: str

    @property
    def split(self) -> Split:
        """The split that the hash of its unit puts it in."""
        return _SHARES.get(int.from_bytes(hashlib.sha256(self.unit.encode()).digest()[:4], "big") % 20, "train")


Draw = Callable[[random.Random], Task]


def draw(kinds: dict[Draw, float], split: Split, rng: random.Random) -> Task:
    """A task of one of the kinds, which have relative frequencies, from the split."""
    while True:
        task = rng.choices(list(kinds), list(kinds.values()))[0](rng)
        if task.split == split:
            return task
