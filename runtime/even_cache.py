"""Passes over even numbers of tokens, for `exact`: a token's logits do not depend on the pass that read it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np

from fusionroute.runtime.backend import Cache, ForwardTogether, HostCache, JointForward, Output, Segment


class EvenCache:
    """A KV cache that is read and answered by twos, whoever asks it.

    Matrix products take rows by twos. A last single row has a kernel of its own, which rounds differently, so no token
    is read alone and none is answered alone.
    """

    def __init__(self, cache: Cache, tokens: list[int], capacity: int):
        """`tokens` is the session's list of all tokens; `capacity` the most that the cache holds."""
        self.cache, self._tokens, self._capacity = cache, tokens, capacity

    @property
    def length(self) -> int:
        """How many tokens the cache holds."""
        return self.cache.length

    @length.setter
    def length(self, length: int) -> None:
        self.cache.length = length

    def forward(self, ids: Sequence[int], positions: Sequence[int]) -> Output:
        """See `Cache.forward`."""
        segment, taken = self.even(Segment(ids, positions))
        return taken(self.cache.forward(*segment))

    def even(self, segment: Segment) -> tuple[Segment, Callable[[Output], Output]]:
        """An even segment to read instead, and what then takes the cache and the output back to what was asked for.

        An odd number of tokens reads the one before again, or at the beginning a copy of the last one too.
        """
        cache, padding = self.cache, 0
        ids, positions = segment
        if len(ids) % 2 and cache.length:
            cache.length -= 1
            ids, positions = (self._tokens[cache.length], *ids), [position + 1 for position in positions]
        elif len(ids) % 2 and len(ids) < self._capacity:
            ids, padding = (*ids, ids[-1]), 1
        unpaired = len(positions) % 2

        def taken(output: Output) -> Output:
            cache.length -= padding
            if not unpaired:
                return output
            return Output(output.logits[1:], None if output.routing is None else output.routing[1:])

        return Segment(ids, (positions[0], *positions) if unpaired else positions), taken

    def copy_prefix(self, other: EvenCache, length: int) -> None:
        """See `Cache.copy_prefix`."""
        self.cache.copy_prefix(other.cache, length)

    def keys_values(self, length: int) -> np.ndarray:
        """See `HostCache.keys_values`; of a cache that is one."""
        return cast(HostCache, self.cache).keys_values(length)

    def interrupt(self) -> None:
        """See `Cache.interrupt`."""
        self.cache.interrupt()


def evenly(forward_both: JointForward) -> JointForward:
    """Joint passes of two EvenCaches: each segment is even, so that no token's kernel depends on the other segment."""

    def forward(router: EvenCache, own: Segment, expert: EvenCache, other: Segment) -> tuple[Output, Output]:
        (own, taken), (other, other_taken) = router.even(own), expert.even(other)
        routed, answered = forward_both(router.cache, own, expert.cache, other)
        return taken(routed), other_taken(answered)

    return forward


def evenly_together(forward_together: ForwardTogether) -> ForwardTogether:
    """`evenly` for any number of EvenCaches."""

    def forward(parts: Sequence[tuple[EvenCache, Segment]]) -> list[Output]:
        even = [(cache.cache, *cache.even(segment)) for cache, segment in parts]
        outputs = forward_together([(cache, segment) for cache, segment, _ in even])
        return [taken(output) for (_, _, taken), output in zip(even, outputs, strict=True)]

    return forward
