"""The stateful form of generation: append tokens, step, rewind."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fusionroute.runtime.arguments import whole
from fusionroute.runtime.decoder import Decoder
from fusionroute.runtime.exclusive import Exclusive
from fusionroute.runtime.options import fusion_coefficients, fusion_or
from fusionroute.runtime.sampling import Sampler, Sampling, SamplingOptions, sampler_of, sampling_of
from fusionroute.runtime.scoring import Scores
from fusionroute.runtime.text import Text, Token
from fusionroute.runtime.text_stream import TextStream

if TYPE_CHECKING:
    from typing_extensions import Unpack

GREEDY = Sampling()


class Session:
    """One text, token by token. Made by `FusionRuntime.session`; use it from one thread at a time.

    A second thread that steps, appends, rewinds or reads logits meanwhile gets a BusyError, and the text stays whole.
    """

    def __init__(
        self, decoder: Decoder, expert_names: list[str], tokenizer: Text | None, fusion: str, lam: float, pinned: int | None = None
    ):
        self._decoder, self._expert_names, self._tokenizer = decoder, expert_names, tokenizer
        self._fusion, self._lam, self._pinned = fusion, lam, pinned
        self._sampler = Sampler(GREEDY)
        self._text = TextStream(tokenizer)
        self._in_use = Exclusive("session")

    def __len__(self) -> int:
        """The number of committed tokens."""
        return len(self._decoder.sequence.ids)

    def __repr__(self) -> str:
        pinned = "" if self._pinned is None else f", expert={self._expert_names[self._pinned]!r}"
        return f"<Session of {len(self)} tokens, fusion={self._fusion!r}, lam={self._lam:g}{pinned}>"

    @property
    def token_ids(self) -> list[int]:
        """The committed tokens: what was appended and what steps have chosen."""
        return list(self._decoder.sequence.ids)

    @property
    def lags(self) -> dict[str, int]:
        """How many committed tokens each expert has not read yet."""
        readers = self._decoder.readers.experts
        return {name: len(self) - reader.length for name, reader in zip(self._expert_names, readers, strict=True)}

    @property
    def drafted(self) -> int:
        """Tokens that speculation guessed since the last rewind."""
        return self._decoder.drafted

    @property
    def accepted(self) -> int:
        """How many of the drafted tokens held."""
        return self._decoder.accepted

    def append(self, ids: Iterable[int]) -> None:
        """Commit tokens without running a model.

        Raises InputError for ids outside the vocabulary or beyond the context.
        """
        with self._in_use:
            self._decoder.append(ids)
            self._text = TextStream(self._tokenizer)

    def rewind(self, n: int) -> None:
        """Keep the first n tokens and forget the rest, in every model. Raises InputError where there are fewer."""
        with self._in_use:
            self._decoder.rewind(n)
            self._text = TextStream(self._tokenizer)

    def clear(self) -> None:
        """Forget all tokens and the random stream, but keep the buffers."""
        self.rewind(0)
        self._sampler = Sampler(GREEDY)

    def step(self, *, fusion: str | None = None, lam: float | None = None, **sampling: Unpack[SamplingOptions]) -> Token:
        """Choose, append and return the next token.

        Sampling arguments are those of `Sampling`; equal ones continue one random stream.

        Raises InputError for an empty session or a full context, ClosedError after the runtime was closed.
        """
        with self._in_use:
            token = self._decoder.advance(*self._settings(fusion, lam, sampling), self._pinned)
            token.text = "".join(ready.text for ready in self._text.push(token))
            return token

    def steps(self, most: int, *, fusion: str | None = None, lam: float | None = None, **sampling: Unpack[SamplingOptions]) -> list[Token]:
        """Like `step`, but with speculation one to `most` tokens: as many as one round gives."""
        most = whole("most", most, 1)
        with self._in_use:
            tokens = self._decoder.advance_some(*self._settings(fusion, lam, sampling), self._pinned, most)
            for token in tokens:
                token.text = "".join(ready.text for ready in self._text.push(token))
            return tokens

    def score(self, ids: Iterable[int], *, fusion: str | None = None, lam: float | None = None) -> Scores:
        """Append tokens, and judge each of them: teacher-forced fused logits, one row a token.

        Row t is the distribution that `ids[t]` would have been chosen from. What was read of the text before is not
        read again, so several endings of one text cost the text once: `rewind` to its length between them. With
        `expert` and `lam=0` the router does not run, and `routing` is NaN.

        Raises InputError as `append` does and for an empty session, NumericalError, ClosedError: the text is as it was
        then.
        """
        with self._in_use:
            self._text = TextStream(self._tokenizer)
            return self._decoder.score(ids, self._coefficients(fusion, lam), self._pinned)

    @property
    def logits(self) -> npt.NDArray[np.float32]:
        """Fused logits that the newest token was chosen from, float32 [V], after the penalty, before the temperature.

        They are handed over, not copied (a device copies them to the host once): the array is the caller's for good.
        Later steps and `close` leave it unchanged. Raises InputError unless a step came last.
        """
        with self._in_use:
            return self._decoder.logits

    def _settings(self, fusion: str | None, lam: float | None, sampling: SamplingOptions) -> tuple[Sampler, tuple[float, float]]:
        """The sampler of a step, and the weights of router and expert."""
        if sampling or self._sampler.sampling != GREEDY:
            settings = sampling_of(sampling)
            if settings != self._sampler.sampling:
                self._sampler = sampler_of(settings, self._decoder.vocab_size)
        return self._sampler, self._coefficients(fusion, lam)

    def _coefficients(self, fusion: str | None, lam: float | None) -> tuple[float, float]:
        """Weights of router and expert logits, by default those of this session. Raises InputError."""
        return fusion_coefficients(fusion_or(fusion, self._fusion), self._lam if lam is None else lam)
