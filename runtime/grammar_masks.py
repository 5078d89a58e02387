"""Which tokens a grammar forbids next, computed by a thread of its own while the models run."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fusionroute.runtime.errors import InputError, printable
from fusionroute.runtime.limits import MAX_ROUND_TOKENS

if TYPE_CHECKING:
    from llguidance import LLMatcher

SLOTS = MAX_ROUND_TOKENS + 1  # places in a text whose masks are kept
NONE = -1
# of each byte of a mask, whose bits are set for tokens that are allowed, lowest first: which are forbidden
FORBIDDEN: npt.NDArray[np.bool_] = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little") == 0


class GrammarMasks:
    """The masks of one answer, as it grows and is cut. Lengths are those of the answer."""

    def __init__(self, matcher: LLMatcher, vocab: int):
        self._matcher, self._vocab = matcher, vocab
        self._words = np.zeros((vocab + 31) // 32, np.uint32)
        self._masks = np.zeros((SLOTS, self._words.nbytes, 8), np.bool_)
        self._lengths = [NONE] * SLOTS  # behind how many tokens each mask is
        self._consumed = 0
        self._thread = ThreadPoolExecutor(1, "fusionroute-grammar")  # ends when this object is collected
        self._work: Future[None] | None = None

    def cut(self, length: int) -> None:
        """The first `length` tokens stay, others may come behind them. Below 0: not even the prompt is the same."""
        length = max(length, 0)
        if self._consumed > length:
            self._settle()
            self._rewind(length)
        self._lengths = [at if at <= length else NONE for at in self._lengths]

    def prepare(self, answer: Sequence[int], offset: int, first: int, last: int) -> None:
        """Begin to compute the masks behind the first `first` … `last` tokens; the answer begins at `offset` of a text."""
        if self._has(first, last):
            return
        self._settle()
        if self._has(first, last):
            return
        start = min(self._consumed, first)
        tokens = list(answer[offset + start : offset + last])
        self._work = self._thread.submit(self._compute, start, tokens, first)

    def forbidden(self, length: int) -> npt.NDArray[np.bool_]:
        """Which tokens may not stand behind the first `length`, bool [V], as `prepare` computed them.

        Raises InputError where the grammar cannot be followed any further.
        """
        if self._work is not None:
            self._work.result()
        assert self._lengths[length % SLOTS] == length
        mask: npt.NDArray[np.bool_] = self._masks[length % SLOTS].reshape(-1)[: self._vocab]
        return mask

    def accepted(self, answer: Sequence[int], offset: int, drafts: list[int]) -> list[int]:
        """The first of some drafts that may follow the answer, one behind the other. Raises as `forbidden`."""
        return drafts[: self._at_end_of(answer, offset).validate_tokens(drafts)]

    def complete(self, answer: Sequence[int], offset: int) -> bool:
        """Whether nothing may follow but the end. Raises as `forbidden`."""
        return bool(self._at_end_of(answer, offset).is_stopped())

    def _at_end_of(self, answer: Sequence[int], offset: int) -> LLMatcher:
        self._settle()
        self._consume(list(answer[offset + self._consumed :]))
        return self._matcher

    def _has(self, first: int, last: int) -> bool:
        return all(self._lengths[length % SLOTS] == length for length in range(first, last + 1))

    def _settle(self) -> None:
        """Wait for the thread. What went wrong there is met again by whoever needs its result."""
        if self._work is not None:
            self._work.exception()
            self._work = None

    def _compute(self, start: int, tokens: list[int], first: int) -> None:
        """The masks from `first` tokens on, on the way through `tokens`, which stand behind the first `start`."""
        self._rewind(start)
        for length in range(start, start + len(tokens) + 1):
            if length > start:
                self._consume(tokens[length - start - 1 : length - start])
            if length < first or self._lengths[length % SLOTS] == length:
                continue
            self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
            self._check()
            np.take(FORBIDDEN, self._words.view(np.uint8), axis=0, out=self._masks[length % SLOTS])
            self._lengths[length % SLOTS] = length

    def _rewind(self, length: int) -> None:
        if self._consumed > length:
            self._matcher.rollback(self._consumed - length)
            self._consumed = length

    def _consume(self, tokens: list[int]) -> None:
        if tokens:
            self._matcher.consume_tokens(tokens)
            self._consumed += len(tokens)
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            fault = self._matcher.get_error().partition("<")[0].strip().rstrip(".")  # behind it llguidance tells its state
            if fault.startswith("NoExtension"):
                raise InputError("The grammar allows no text, or none that goes on from here: widen it.")
            raise InputError(f"The grammar cannot be followed any further ({printable(fault)}): use a simpler one.")
