"""A stream's tokens, and when they came."""

from __future__ import annotations

import time
from collections.abc import Iterator

from fusionroute.runtime.stream import Stream
from fusionroute.runtime.text import Token


class Recording(Iterator[Token]):
    """Passes the tokens of a stream on, and keeps them with their times in seconds from now."""

    def __init__(self, stream: Stream):
        self.stream, self.tokens = stream, list[Token]()
        self.times: list[float] = []
        self._start = time.perf_counter()

    def __next__(self) -> Token:
        token = next(self.stream)
        self.times.append(time.perf_counter() - self._start)
        self.tokens.append(token)
        return token

    @property
    def first_seconds(self) -> float | None:
        """Until the first token, the prompt included; None without a token."""
        return self.times[0] if self.times else None

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens behind the first; None where that is none."""
        return (len(self.times) - 1) / (self.times[-1] - self.times[0]) if len(self.times) > 1 and self.times[-1] > self.times[0] else None
