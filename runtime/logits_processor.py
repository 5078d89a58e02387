"""What changes the fused logits of one text before a token is chosen, on the host: biases, penalties, forbidden tokens.

In the order of Hugging Face's processors: bias, repetition penalty, presence and frequency penalties, forbidden tokens.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fusionroute.runtime.arguments import shown
from fusionroute.runtime.backend import Fused
from fusionroute.runtime.errors import InputError
from fusionroute.runtime.grammar_masks import GrammarMasks
from fusionroute.runtime.occurrences import Occurrences


class Penalties(NamedTuple):
    """repetition divides positive logits, and multiplies others, of tokens of prompt and answer (arXiv:1909.05858).

    presence is subtracted once from the logits of tokens of the answer, frequency as often as they occur there.
    """

    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0


NO_PENALTIES = Penalties()


class Processed(NamedTuple):
    """What a `backend.Fused` of one position says after processing, in buffers that the next one overwrites.

    raw: the row before it, float32 [V].
    """

    ids: npt.NDArray[np.int64]
    logits: npt.NDArray[np.float32]
    log_normaliser: npt.NDArray[np.float32]
    sampling_normaliser: npt.NDArray[np.float32]
    rows: npt.NDArray[np.float32]
    raw: npt.NDArray[np.float32]


class LogitsProcessor:
    """The processing of one text, as it grows and is cut."""

    def __init__(
        self,
        vocab: int,
        bias: Mapping[int, float] | None = None,
        penalties: Penalties = NO_PENALTIES,
        ends: Collection[int] = (),
        min_new_tokens: int = 0,
        masks: GrammarMasks | None = None,
    ):
        """`ends`: forbidden before the answer has `min_new_tokens`. `masks`: what a grammar forbids.

        Raises InputError for an id outside the vocabulary.
        """
        bias = bias or {}
        if wrong := [id for id in bias if not 0 <= id < vocab]:
            raise InputError(f"Token id {shown(wrong[0])} of logit_bias is outside the vocabulary: expected 0 to {vocab - 1}.")
        self._bias_ids, self._bias = np.fromiter(bias, np.int64, len(bias)), np.fromiter(bias.values(), np.float32, len(bias))
        self._penalties = penalties
        self._ends, self._min_new_tokens = np.array(sorted(ends), np.int64), min_new_tokens
        self._text, self._answer = Occurrences(), Occurrences()
        self._masks, self._answer_length = masks, 0
        self._rows, self._scratch = np.empty((1, vocab), np.float32), np.empty(vocab, np.float64)
        self._normalisers = np.empty((2, 1), np.float32)

    def follow(self, ids: Sequence[int], answer_start: int, length: int, unchanged: int) -> None:
        """The next token comes behind the first `length` of these ids, of which the answer begins at `answer_start`.

        The first `unchanged` ids are those of the last call.
        """
        self._answer_length = length - answer_start
        if self._masks is not None:
            self._masks.cut(unchanged - answer_start)
        if self._penalties.repetition != 1:
            self._text.follow(ids, 0, length, unchanged)
        if self._penalties.presence or self._penalties.frequency:
            self._answer.follow(ids, answer_start, length, unchanged)

    def prepare(self, ids: Sequence[int], answer_start: int, first: int, last: int) -> None:
        """Begin to compute what the grammar forbids behind the first `first` … `last` of the ids that `follow` saw."""
        if self._masks is not None:
            self._masks.prepare(ids, answer_start, first - answer_start, last - answer_start)

    def accepted(self, ids: Sequence[int], answer_start: int, drafts: list[int]) -> list[int]:
        """The first of some drafts that the grammar allows behind the ids that `follow` saw."""
        return drafts if self._masks is None else self._masks.accepted(ids, answer_start, drafts)

    def complete(self, ids: Sequence[int], answer_start: int) -> bool:
        """Whether the grammar allows nothing behind the ids that `follow` saw."""
        return self._masks is not None and self._masks.complete(ids, answer_start)

    def process(self, fused: Fused, count: int, temperature: float) -> Processed:
        """Process the only row of a fusion without penalty; `count` candidates of what comes out.

        Fewer come where fewer tokens may be chosen. Raises InputError where none may.
        """
        raw: npt.NDArray[np.float32] = np.asarray(fused.rows)[0]
        row, (log_normaliser, sampling_normaliser) = self._rows[0], self._normalisers
        row[:] = raw
        log_normaliser[0] = fused.log_normaliser[0]
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # what is not finite any more is refused later
            self._change(row)
        ids = largest(row, count)
        logits = row[ids]
        peak = float(logits[0])
        if peak == -math.inf and math.isfinite(log_normaliser[0]):
            raise InputError("No token is left to choose: logit_bias or min_new_tokens bars all that may stand here.")
        sampling_normaliser[0] = self._log_sum(row, peak, temperature)
        return Processed(ids[None], logits[None], log_normaliser, sampling_normaliser, self._rows, raw)

    def _change(self, row: npt.NDArray[np.float32]) -> None:
        repetition, presence, frequency = self._penalties
        row[self._bias_ids] += self._bias
        if repetition != 1:
            repeated = row[self._text.ids]
            row[self._text.ids] = np.where(repeated > 0, repeated / np.float32(repetition), repeated * np.float32(repetition))
        if presence or frequency:
            row[self._answer.ids] -= np.float32(frequency) * self._answer.counts + np.float32(presence)
        if self._answer_length < self._min_new_tokens:
            row[self._ends] = -np.inf
        if self._masks is not None:
            np.copyto(row, -np.inf, where=self._masks.forbidden(self._answer_length))

    def _log_sum(self, row: npt.NDArray[np.float32], peak: float, temperature: float) -> float:
        """logsumexp of row / temperature; NaN where the largest logit is not finite."""
        if not math.isfinite(peak):
            return math.nan
        np.subtract(row, peak, out=self._scratch)
        self._scratch /= temperature
        np.exp(self._scratch, out=self._scratch)
        return peak / temperature + math.log(self._scratch.sum())


def largest(row: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.int64]:
    """The ids of the `count` largest logits of a row [V], in descending order, the lower id first among equals.

    Without those of −inf, unless all are.
    """
    if count == 1:
        return np.array([row.argmax()], np.int64)
    ids = np.arange(len(row))
    if count < len(row):
        ids = np.flatnonzero(row >= np.partition(row, len(row) - count)[len(row) - count])
    ids = ids[np.argsort(-row[ids], kind="stable")[:count]]
    finite = int(np.count_nonzero(row[ids] > -np.inf))
    return ids[: max(finite, 1)]


def top_logprobs(row: npt.NDArray[np.float32], log_normaliser: float, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` likeliest tokens of a row [V], each with its log-probability."""
    ids = largest(row, count)
    return tuple((int(id), float(row[id]) - log_normaliser) for id in ids)


def ranked(row: npt.NDArray[np.float32], count: int) -> tuple[tuple[int, float], ...]:
    """`top_logprobs` of a row whose normaliser is not known."""
    peak = float(row.max())
    return top_logprobs(row, peak + math.log(np.exp(row - np.float32(peak)).sum(dtype=np.float64)), count)
