"""The stateful form of generation: append tokens, step, rewind."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fusionroute.runtime import saved_text
from fusionroute.runtime.arguments import path, shown, whole
from fusionroute.runtime.decoder import Decoder
from fusionroute.runtime.errors import ClosedError, InputError
from fusionroute.runtime.exclusive import Exclusive
from fusionroute.runtime.options import fusion_coefficients, fusion_or
from fusionroute.runtime.sampling import Sampler, Sampling, SamplingOptions, sampler_of, sampling_of
from fusionroute.runtime.scoring import Scores
from fusionroute.runtime.text import Text, Token
from fusionroute.runtime.text_stream import LateTexts

if TYPE_CHECKING:
    from typing_extensions import Unpack

GREEDY = Sampling()


class Session:
    """One text, token by token. Made by `FusionRuntime.session`; use it from one thread at a time.

    A second thread that steps, appends, rewinds or reads logits meanwhile gets a BusyError, and the text stays whole.

    As a context manager it is closed at the end. One that is dropped keeps nothing for other texts.
    """

    def __init__(
        self,
        make: Callable[[], Decoder],
        give_back: Callable[[Decoder], None],
        expert_names: list[str],
        tokenizer: Text | None,
        fusion: str,
        lam: float,
        pinned: int | None = None,
    ):
        """`make`: a new decoder; `give_back`: for one whose text is over."""
        self._make, self._give_back, self._expert_names, self._tokenizer = make, give_back, expert_names, tokenizer
        self._fusion, self._lam, self._pinned = fusion, lam, pinned
        self._usual = fusion_coefficients(fusion, lam)
        self._opened: Decoder | None = make()
        self._sampler = Sampler(GREEDY)
        self._texts = LateTexts(tokenizer)
        self._in_use = Exclusive("session")

    @property
    def _decoder(self) -> Decoder:
        if self._opened is None:
            raise ClosedError("The session was closed: begin another with `session`.")
        return self._opened

    def __len__(self) -> int:
        """The number of committed tokens."""
        return len(self._decoder.sequence.ids)

    def __repr__(self) -> str:
        pinned = "" if self._pinned is None else f", expert={self._expert_names[self._pinned]!r}"
        length = "closed" if self._opened is None else f"{len(self)} tokens"
        return f"<Session of {length}, fusion={self._fusion!r}, lam={self._lam:g}{pinned}>"

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
            self._texts = LateTexts(self._tokenizer)

    def rewind(self, n: int) -> None:
        """Keep the first n tokens and forget the rest, in every model. Raises InputError where there are fewer."""
        with self._in_use:
            self._decoder.rewind(n)
            self._texts = LateTexts(self._tokenizer)

    def clear(self) -> None:
        """Forget all tokens and the random stream, but keep the buffers."""
        self.rewind(0)
        self._sampler = Sampler(GREEDY)

    def read(self, experts: Iterable[str] | None = None) -> None:
        """Let the router and some experts read the text now, as steps would when they need it; None: all experts.

        The newest two or three tokens are left to the step that answers behind them. Raises InputError for a name that
        is no expert's, UnavailableError, ClosedError, NumericalError.
        """
        with self._in_use:
            names = self._expert_names if experts is None else list(experts)
            if wrong := next((name for name in names if name not in self._expert_names), None):
                raise InputError(f"Unknown expert {shown(wrong)}: use one of {', '.join(self._expert_names)}.")
            self._decoder.read_ahead([self._expert_names.index(name) for name in names])

    def save(self, file: str | Path) -> None:
        """Write the text, and what router and experts keep of what they have read of it, in place of an older file.

        The file appears whole, and belongs to the bundle, the precision and `exact`. Of experts that were added to the
        runtime it keeps nothing, and of the random stream. Raises InputError where it cannot be written,
        UnavailableError for a device that keeps keys and values in its own memory.
        """
        with self._in_use:
            saved_text.save(self._decoder, path("file", file))

    def load(self, file: str | Path) -> None:
        """Take the place of this text with one that `save` wrote: nothing that was read before is read again.

        Tokens are then those of a session that was never saved. Other sessions and streams whose texts begin alike
        share what was read, as ever. Raises InputError for a file of another bundle, precision or `exact`, and for one
        that is none or was damaged; UnavailableError as `save` and beyond `kv_memory`: the text is as it was then.
        """
        with self._in_use:
            _ = self._decoder  # a closed session says so
            source, decoder = path("file", file), self._make()
            saved_text.load(decoder, source)
            self._opened, self._sampler, self._texts = decoder, Sampler(GREEDY), LateTexts(self._tokenizer)

    def close(self) -> None:
        """End the session. Its text is kept for prompts that begin alike as one is that was generated, see `prefix_cache`."""
        with self._in_use:
            if self._opened is not None:
                self._give_back(self._opened)
                self._opened = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def step(self, *, fusion: str | None = None, lam: float | None = None, **sampling: Unpack[SamplingOptions]) -> Token:
        """Choose, append and return the next token.

        Sampling arguments are those of `Sampling`; equal ones continue one random stream.

        Raises InputError for an empty session or a full context, ClosedError after the runtime was closed.
        """
        with self._in_use:
            token = self._decoder.advance(*self._settings(fusion, lam, sampling), self._pinned)
            token.text = self._texts.text_of(token.id)
            return token

    def steps(self, most: int, *, fusion: str | None = None, lam: float | None = None, **sampling: Unpack[SamplingOptions]) -> list[Token]:
        """Like `step`, but with speculation one to `most` tokens: as many as one round gives."""
        most = whole("most", most, 1)
        with self._in_use:
            tokens = self._decoder.advance_some(*self._settings(fusion, lam, sampling), self._pinned, most)
            for token in tokens:
                token.text = self._texts.text_of(token.id)
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
            self._texts = LateTexts(self._tokenizer)
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
        if fusion is None and lam is None:
            return self._usual
        return fusion_coefficients(fusion_or(fusion, self._fusion), self._lam if lam is None else lam)
