"""Which of several replicas should answer: the one that has read the beginning of a prompt, unless it is too busy."""

from __future__ import annotations

import json
import random
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Mapping

LEAST_SHARED = 100  # characters: less is read again in no time, and may be nothing but the form of a conversation
LONGEST = 1 << 15  # characters of a prompt that are remembered


class PrefixAffinity:
    """What each replica has read lately. `texts`: prompts to remember of each, as many as it keeps; `slack`: requests
    that a replica may have more than the idlest one and still be preferred.
    """

    def __init__(self, texts: int, slack: int):
        self._read: dict[str, deque[str]] = defaultdict(lambda: deque(maxlen=texts))
        self._slack = slack

    def note(self, replica: str, text: str) -> None:
        """A replica reads a prompt."""
        if len(text) >= LEAST_SHARED:
            self._read[replica].append(text)

    def forget(self, replica: str) -> None:
        """A replica is gone."""
        self._read.pop(replica, None)

    def order(self, text: str, loads: Mapping[str, int]) -> list[str]:
        """Replicas, the best first: by the characters that need no reading, then by `loads`, their running requests,
        then by chance.
        """
        idlest = min(loads.values(), default=0)

        def rank(replica: str) -> tuple[int, int, float]:
            load = loads[replica]
            return (-self._shared(replica, text) if load - idlest <= self._slack else 0), load, random.random()

        return sorted(loads, key=rank)

    def _shared(self, replica: str, text: str) -> int:
        longest = max((shared_length(text, read) for read in self._read.get(replica, ())), default=0)
        return longest if longest >= LEAST_SHARED else 0


def shared_length(first: str, second: str) -> int:
    """Characters of the beginning that two texts share."""
    lengths = range(1, min(len(first), len(second)) + 1)
    return bisect_left(lengths, True, key=lambda length: first[:length] != second[:length])


def prompt_text(body: bytes) -> str:
    """What a request asks to read, so that prompts that begin alike are texts that begin alike; "" where it is no request."""
    try:
        request = json.loads(body)
        prompt = request.get("prompt")
        return (prompt if isinstance(prompt, str) else json.dumps(prompt or [request.get("tools"), request["messages"]]))[:LONGEST]
    except (ValueError, AttributeError, KeyError, RecursionError):
        return ""
