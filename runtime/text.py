"""Tokens, and their text: encoding and decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from fusionroute.runtime.errors import BundleError, FusionError, InputError, one_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def failed(error: BaseException) -> FusionError:
    """What to raise for an error of the native library, whose panics are no Exceptions. Raises others, as Ctrl-C, again."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # pyo3 gives it no name to import
        raise error
    return FusionError(f"The tokenizer fails on this text ({one_line(error)}); export the bundle again.")


Ranked = tuple[tuple[int, float], ...]  # ids, the likeliest first, with their log-probabilities


class Likeliest(NamedTuple):
    """The likeliest tokens at one place, at temperature 1 and without penalties: by the router, by the expert that
    answered, and by their fusion. Empty for a model that did not run.
    """

    router: Ranked
    expert: Ranked
    fused: Ranked


class Token:
    """One generated token.

    `logprob` is that of the fused distribution at temperature 1; `text` is what it adds to the decoded text. `routing`:
    the router's scores, float32 [n_experts]. `top_logprobs`: the likeliest ids with their log-probabilities in the same
    distribution, as many as were asked for. `candidates`: those of router and expert too, where they were asked for.

    What nobody asks for is not computed: log-probability and text may be functions until then, and scores a list.
    """

    __slots__ = ("__weakref__", "_logprob", "_routing", "_text", "candidates", "expert", "id", "top_logprobs")
    __hash__ = None  # type: ignore[assignment]

    def __init__(
        self,
        id: int,
        expert: str,
        logprob: float | Callable[[], float],
        routing: npt.NDArray[np.float32] | list[float],
        text: str | Callable[[], str] = "",
        top_logprobs: Ranked = (),
        candidates: Likeliest | None = None,
    ):
        self.id, self.expert, self.top_logprobs, self.candidates = id, expert, top_logprobs, candidates
        self._logprob, self._routing, self._text = logprob, routing, text

    @property
    def logprob(self) -> float:
        """At temperature 1, without penalty."""
        if callable(self._logprob):
            self._logprob = self._logprob()
        return self._logprob

    @property
    def routing(self) -> npt.NDArray[np.float32]:
        """Float32 [n_experts]; NaN where the router did not run."""
        if isinstance(self._routing, list):
            self._routing = np.array(self._routing, np.float32)
        return self._routing

    @property
    def text(self) -> str:
        """Whole characters: one of several tokens belongs to the last of them. Raises FusionError where decoding fails."""
        if callable(self._text):
            self._text = self._text()
        return self._text

    @text.setter
    def text(self, text: str | Callable[[], str]) -> None:
        self._text = text

    def _compared(self) -> tuple[object, ...]:
        return self.id, self.expert, self.logprob, self.text, self.top_logprobs, self.candidates

    def __eq__(self, other: object) -> bool:
        return self._compared() == other._compared() if isinstance(other, Token) else NotImplemented

    def __repr__(self) -> str:
        return (
            f"Token(id={self.id}, expert={self.expert!r}, logprob={self.logprob}, routing={self.routing}, text={self.text!r}, "
            f"top_logprobs={self.top_logprobs}, candidates={self.candidates})"
        )

    def __reduce__(self) -> tuple[type[Token], tuple[object, ...]]:
        return Token, (self.id, self.expert, self.logprob, self.routing, self.text, self.top_logprobs, self.candidates)


class Text:
    """A bundle's tokenizer. `special`: the special tokens, id → how it is spelled."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        # A tokenizer.json left over from training may truncate or pad prompts without a word.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.special: dict[int, str] = {id: token.content for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._bytes: dict[int, int] = {}  # byte-fallback tokens, and the byte that each stands for
        letter = tokenizer.token_to_id("<0x41>")
        if letter is not None and self.decode([letter]) == "A":
            ids = {byte: tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
            self._bytes = {id: byte for byte, id in ids.items() if id is not None}

    @classmethod
    def load(cls, path: str | Path) -> Text:
        """Read a `tokenizer.json`. Raises BundleError for a file that is missing or is not a tokenizer."""
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise BundleError(f"{path} cannot be read as a tokenizer.json ({error.strerror}); export the bundle again.") from error
        return cls.parse(content, path)

    @classmethod
    def parse(cls, content: bytes, path: str | Path) -> Text:
        """A tokenizer from the content of its file; `path` tells where it was. Raises BundleError where it is none."""
        from tokenizers import Tokenizer

        try:
            return cls(Tokenizer.from_str(content.decode()))
        except BaseException as error:  # tokenizers raises nothing more precise
            failed(error)
            raise BundleError(f"{path} cannot be read as a tokenizer.json ({one_line(error)}); export the bundle again.") from error

    @cached_property
    def longest(self) -> int:
        """Characters of the longest token."""
        return max(map(len, self._tokenizer.get_vocab()), default=1)

    def json(self) -> str:
        """The tokenizer as a tokenizer.json, without truncation and padding."""
        content: str = self._tokenizer.to_str()
        return content

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids, with the special tokens of tokenizer.json (BOS); `special=False` for text from a chat template.

        Other threads run meanwhile. Raises InputError unless `text` is a str of whole characters, FusionError where the
        tokenizer fails on it.
        """
        try:
            # a batch of one text, which must be no pair of texts: `encode` (0.23) holds the GIL
            ids: list[int] = self._tokenizer.encode_batch(["" + text], add_special_tokens=special)[0].ids
        except TypeError as error:  # also for surrogates, such as undecodable bytes of a command line
            raise InputError("The text is not a str of valid Unicode characters: pass text that was decoded as UTF-8.") from error
        except BaseException as error:
            raise failed(error) from error
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids outside the vocabulary add nothing.

        Raises InputError for one that is not a whole number from 0, FusionError where the tokenizer fails on them.
        """
        try:
            text: str = self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        except (TypeError, OverflowError) as error:
            raise InputError("The token ids are not all whole numbers from 0: pass ids as `encode` gives them.") from error
        except BaseException as error:
            raise failed(error) from error
        return text

    def piece(self, id: int) -> str:
        """What a token adds to a text, special tokens too; not cut at a character's end."""
        once, twice = (self.decode([id] * count, skip_special_tokens=False) for count in (1, 2))  # a text's first loses its space
        return twice[len(once) :]

    def silent(self, id: int) -> bool:
        """Whether `decode` leaves this id out: special tokens, and ids that pad the vocabulary."""
        return id in self.special or self._tokenizer.id_to_token(id) is None

    def byte(self, id: int) -> int | None:
        """The byte that a byte-fallback token stands for; None for all other tokens."""
        return self._bytes.get(id)
