"""Idle decoders of a runtime: their buffers, and what they have read, serve the next text."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from fusionroute.runtime.decoder import Decoder

MAX_IDLE = 4  # decoders that are kept, unless the prefix cache asks for more


class Pool:
    """`prefixes`: finished texts that are kept for prompts that begin alike, before a decoder is used again."""

    def __init__(self, prefixes: int):
        self.idle: list[Decoder] = []
        self._prefixes = prefixes
        self._open = True
        self._lock = threading.RLock()  # a stream may be collected, and give its decoder back, while it is held

    def take(self, ids: Sequence[int], make: Callable[[], Decoder]) -> Decoder:
        """An idle decoder: the one whose prompt begins as `ids` do, else the one idle for longest; or a new one."""
        with self._lock:
            shared = [decoder.shared_prefix(ids) for decoder in self.idle]
            if self.idle and (max(shared) > 0 or len(self.idle) >= self._prefixes):
                return self.idle.pop(shared.index(max(shared)))
        return make()

    def give(self, decoder: Decoder) -> None:
        """The text of a decoder is over: it waits for another one."""
        with self._lock:
            if self._open and len(self.idle) < max(MAX_IDLE, self._prefixes):
                self.idle.append(decoder)

    def drop_oldest(self) -> bool:
        """Forget the text that has been idle for longest; whether there was one."""
        with self._lock:
            oldest = self.idle.pop(0) if self.idle else None
        return oldest is not None  # its buffers go when this returns, outside the lock

    def empty(self) -> None:
        """Forget the texts that are kept."""
        with self._lock:
            self.idle.clear()

    def close(self) -> None:
        """Keep no decoder any more."""
        with self._lock:
            self._open = False
            self.idle.clear()
