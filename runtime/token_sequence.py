"""The committed tokens of one session, which its router and its experts read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import takewhile
from operator import eq

from fusionroute.runtime.cancellation import UNWATCHED_TOKENS, Cancellation
from fusionroute.runtime.limits import even

UNWATCHED: AbstractContextManager[None] = nullcontext()


class TokenSequence:
    """Token ids, and how many of them were there before the first step.

    `cancellation`: what may end the current generation.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.cancellation: Cancellation | None = None
        self.prompt_length = 0  # 0 until the first step; other sessions may copy what was read of the prompt
        self.answer_start = 0  # tokens that were appended; behind them come those that steps have chosen
        self.unchanged = 0  # leading tokens that are the same since somebody set this to their number
        self.lending = threading.Lock()  # held while another session copies what was read, and while that is forgotten

    def watching(self, token_count: int, interrupt: Callable[[], None]) -> AbstractContextManager[None]:
        """For a pass over so many tokens: cancellation calls `interrupt` on its way, unless the pass is short.

        Raises Interrupted if the generation is to end already.
        """
        cancellation = self.cancellation
        if cancellation is None or not cancellation.armed or token_count <= UNWATCHED_TOKENS:
            return UNWATCHED
        cancellation.check()
        return cancellation.interrupting(interrupt)

    def append(self, ids: Sequence[int]) -> None:
        """Tokens that were not chosen by a step: an answer begins behind them."""
        self.ids += ids
        self.answer_start = len(self.ids)

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens."""
        del self.ids[length:]
        self.unchanged = min(self.unchanged, length)
        self.answer_start = min(self.answer_start, length)

    def start_decoding(self) -> None:
        """The first step comes: what is there so far is the prompt."""
        self.prompt_length = self.prompt_length or len(self.ids)

    def limit_prompt(self, length: int) -> None:
        """Lend no tokens behind the first `length`. Waits for a session that copies some of them."""
        with self.lending:
            self.prompt_length = min(self.prompt_length, length)

    def shared_prefix(self, ids: Sequence[int]) -> int:
        """How many leading tokens of a prompt begin this one too: an even number, without the last token of either.

        The last tokens of a prompt are read by the pass that answers.
        """
        longest = max(min(self.prompt_length - 1, len(ids) - 2), 0)
        return even(sum(takewhile(bool, map(eq, self.ids[:longest], ids))))
