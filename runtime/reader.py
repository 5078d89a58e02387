"""How one model reads the tokens of one session into its KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np

from fusionroute.runtime import limits
from fusionroute.runtime.backend import Cache, HostCache, Output, Segment
from fusionroute.runtime.cancellation import UNWATCHED_TOKENS
from fusionroute.runtime.errors import UnavailableError
from fusionroute.runtime.even_cache import EvenCache
from fusionroute.runtime.loaded_system import LoadedSystem
from fusionroute.runtime.token_sequence import TokenSequence


class Reader:
    """One model that reads one session's tokens into a KV cache, in passes whose lengths depend on the tokens alone."""

    def __init__(self, system: LoadedSystem, sequence: TokenSequence, expert: int | None):
        """`expert` None: the router."""
        self._system, self._sequence, self._expert = system, sequence, expert
        self._cache: Cache | None = None
        self._in_pieces = expert is not None and system.background_prefill
        self._prefixes = None if system.prefixes is None else system.prefixes[expert]
        self._room = 0  # tokens that the cache may hold of what it has taken, see `KvMemory`
        self.kv_bytes = 0

    @property
    def cache(self) -> Cache:
        """The KV cache, made at first use: a model that never runs costs nothing.

        Raises ClosedError once the runtime is closed.
        """
        backend = self._system.backend
        if self._cache is None:
            model = backend.router if self._expert is None else backend.experts[self._expert]
            cache = model.cache()
            self._cache = EvenCache(cache, self._sequence.ids, self._system.max_seq_len) if self._system.exact else cache
        return self._cache

    @property
    def length(self) -> int:
        """How many tokens the model has read."""
        return 0 if self._cache is None else self._cache.length

    @property
    def chunk(self) -> int:
        """Most tokens of a pass that answers nothing."""
        return min(limits.CHUNK, self._system.backend.prefill_chunk)

    def read(self, positions: Sequence[int]) -> Output:
        """Read up to the last of some ascending positions close together; the output at each of them, see `Output`.

        What was read behind the first of them is read again. Raises ClosedError, and Interrupted for a cancelled
        generation.
        """
        position, cache = positions[0], self._cache
        if cache is not None and cache.length == position == positions[-1]:  # the next token, as of most passes
            _ = self._system.backend  # a closed runtime says so
            return self.forward(self._sequence.ids[position : position + 1], (0,))
        *leading, last = self.passes(positions)
        for segment in leading:
            self.forward(*segment)
        return self.forward(*last)

    def passes(self, positions: Sequence[int]) -> list[Segment]:
        """The segments that `read` reads, one a pass; the last one answers. The cache forgets what is read again."""
        end = positions[-1] + 1
        self.take_room(end)
        cache, ids = self._cache_with_prefix(), self._sequence.ids
        start = cache.length = min(cache.length, positions[0])
        segments = []
        while (stop := self._pass_end(start, positions[0], end)) < end:
            segments.append(Segment(ids[start:stop], (stop - start - 1,)))
            start = stop
        return [*segments, Segment(ids[start:end], [position - start for position in positions])]

    def _pass_end(self, start: int, first: int, end: int) -> int:
        """Where the next pass ends, on the way from `start` to `end`. The last pass answers, from position `first` on.

        Only a decode step reads a single token, and only the last pass an odd number: see `prefix`.
        """
        if self._in_pieces:
            stop = limits.boundary(start)
            return stop if stop < first else end
        chunk = self.chunk
        stop = min(start + chunk, first)
        stop -= 2 * (end - stop == 1)
        return end if end - start <= chunk else max(stop - (stop - start) % 2, start + 1)

    def read_piece(self, limit: int) -> bool:
        """See `background_prefill.PieceReader.read_piece`."""
        if limits.boundary(self.length) > limit:
            return False
        try:
            self.take_room(limit)
        except UnavailableError:  # it is raised where the expert is chosen, if there is no room then either
            return False
        cache = self._cache_with_prefix()
        if (stop := limits.boundary(cache.length)) <= limit:
            cache.forward(self._sequence.ids[cache.length : stop], (stop - cache.length - 1,))
        return True

    def forward(self, ids: Sequence[int], positions: Sequence[int]) -> Output:
        """One pass over the next tokens; the output at some positions, counted within `ids`.

        Cancellation interrupts a long pass on its way: what it has written lies beyond the cache's length.
        """
        cache = self._cache or self.cache
        self.take_room(cache.length + len(ids))
        if len(ids) <= UNWATCHED_TOKENS:
            return cache.forward(ids, positions)
        with self._sequence.watching(len(ids), cache.interrupt):
            return cache.forward(ids, positions)

    def take_room(self, length: int) -> None:
        """Let the cache grow to so many tokens, by PIECE at a time. Raises UnavailableError beyond `kv_memory`."""
        capacity = self._system.max_seq_len
        length = min(length + 2, capacity)  # exact passes, and those of one base, write dummy tokens behind the last
        if length > self._room:
            room = min(-(-length // limits.PIECE) * limits.PIECE, capacity)
            self._system.kv_memory.grow(self, self._system.kv_bytes(self._expert, room))
            self._room = room

    def keys_values(self, length: int) -> np.ndarray:
        """Those of the first `length` tokens, to read or to fill, see `HostCache`. Raises UnavailableError, as `take_room`."""
        self.take_room(length)
        return cast(HostCache, self.cache).keys_values(length)

    def truncate(self, length: int) -> None:
        """Forget what was read behind the first `length` tokens."""
        if self._cache is not None and self._cache.length > length:
            self._cache.length = length

    def discard(self) -> None:
        """Drop the cache, and let no session borrow what others have read: NaN in it would stay in all that follows.

        Masked keys are multiplied by zero on some devices, and 0 · NaN is NaN: to truncate it is not enough.
        """
        self._cache = None
        self._room = self.kv_bytes = 0
        if self._prefixes is not None:
            self._prefixes.forget()

    def _cache_with_prefix(self) -> Cache:
        """The cache; before its first token with what other sessions have read of the text."""
        cache = self.cache
        if self._prefixes is not None and not cache.length:
            self._prefixes.borrow(self, self._sequence.ids, cache)
        return cache

    def start_lending(self) -> None:
        """Let other sessions copy what was read of the prompt."""
        if self._prefixes is not None and self.length:
            self._prefixes.enrol(self)

    def offer(self, ids: Sequence[int]) -> int:
        """See `Lender.offer`."""
        return limits.even(min(self._sequence.shared_prefix(ids), self.length))

    def lend(self, ids: Sequence[int], cache: Cache) -> None:
        """See `Lender.lend`."""
        with self._sequence.lending:
            length = self.offer(ids)
            if self._cache is not None and length:
                cache.copy_prefix(self._cache, length)
