"""What a generation gives: its tokens as they come, and the whole."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from fusionroute.runtime.arguments import check_names
from fusionroute.runtime.chat import ChatOptions
from fusionroute.runtime.exclusive import Exclusive
from fusionroute.runtime.sampling import SamplingOptions
from fusionroute.runtime.text import Token
from fusionroute.runtime.text_rules import RuleOptions, TextRules


class TextOptions(SamplingOptions, RuleOptions, ChatOptions, total=False):
    """How tokens are chosen, what the text must look like, and what a chat template is given."""


class StreamOptions(TextOptions, total=False):
    """The options of `FusionRuntime.stream`, which `generate` passes on."""

    stop: str | Sequence[str] | None
    fusion: str | None
    lam: float | None
    expert: str | None
    drafts: bool
    cancel: threading.Event | None
    deadline: float | None


def split(options: Mapping[str, Any]) -> tuple[ChatOptions, TextRules, SamplingOptions]:
    """`TextOptions` by what they are for. Raises InputError for an unknown name."""
    check_names(options, ("max_new_tokens", *StreamOptions.__annotations__))
    chat = {name: value for name, value in options.items() if name in ChatOptions.__annotations__}
    rules = {name: value for name, value in options.items() if name in RuleOptions.__annotations__}
    sampling = {name: value for name, value in options.items() if name not in chat and name not in rules}
    return cast(ChatOptions, chat), TextRules(**rules), cast(SamplingOptions, sampling)


@dataclass(frozen=True)
class Result:
    """A finished generation. `token_ids` and `experts` (one name per token) exclude the end-of-sequence token.

    finish_reason: "stop" (end of sequence or a stop string), "length" (max_new_tokens or the context), "cancelled",
    "deadline". drafted, accepted: tokens that speculation guessed, and how many of them held. top_logprobs: see `Token`.
    """

    text: str
    token_ids: list[int]
    experts: list[str]
    logprobs: list[float]
    finish_reason: str
    drafted: int = 0
    accepted: int = 0
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)

    @classmethod
    def of(cls, tokens: Sequence[Token], stream: Stream) -> Result:
        """The tokens that came out of a stream."""
        return cls(
            text="".join(token.text for token in tokens),
            token_ids=[token.id for token in tokens],
            experts=[token.expert for token in tokens],
            logprobs=[token.logprob for token in tokens],
            finish_reason=stream.finish_reason or "cancelled",
            drafted=stream.drafted,
            accepted=stream.accepted,
            top_logprobs=[token.top_logprobs for token in tokens],
        )


class End(NamedTuple):
    """The last thing that a stream is told."""

    reason: str
    drafted: int
    accepted: int


class Stream(Iterator[Token]):
    """Tokens as they become certain; at the end `finish_reason` and the counts of speculation are set, see `Result`.

    Belongs to the thread that iterates it: other threads end it through `cancel`.
    """

    finish_reason: str | None = None
    drafted = accepted = 0

    def __init__(self, tokens: Generator[Token | End, None, None], release: Callable[[], None]):
        """`release` is called once, when no more tokens can come: also for a stream that never began."""
        self._tokens, self._release = tokens, release
        self._in_use = Exclusive("stream")

    @classmethod
    def ended(cls, reason: str) -> Stream:
        """One that gives no token."""
        return cls((item for item in (End(reason, 0, 0),)), no_release)

    def __next__(self) -> Token:
        """Raises what generating raises, and BusyError while another thread waits for a token."""
        with self._in_use:
            try:
                for item in self._tokens:
                    if isinstance(item, Token):
                        return item
                    self.finish_reason, self.drafted, self.accepted = item
            except BaseException:
                self._end()
                raise
            self._end()
            raise StopIteration

    def close(self) -> None:
        """Stop generating; tokens not yet handed out are dropped. Raises BusyError as the next token does."""
        with self._in_use:
            self._tokens.close()
            self.finish_reason = self.finish_reason or "cancelled"
            self._end()

    def __del__(self) -> None:
        if hasattr(self, "_in_use"):
            self._end()

    def _end(self) -> None:
        release, self._release = self._release, no_release
        release()


def no_release() -> None:
    """What was to be released already is."""
