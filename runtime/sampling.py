"""The choice of the next token: exact sampling from a few top candidates, and from the full row only if it must be."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt

from fusionroute.runtime.arguments import check_names, real, shown, whole
from fusionroute.runtime.errors import InputError
from fusionroute.runtime.grammar_masks import GrammarMasks
from fusionroute.runtime.logits_processor import LogitsProcessor, Penalties
from fusionroute.runtime.occurrences import Occurrences

DEFAULT_CANDIDATES = 256  # without a top-k: almost always enough, and still cheap to copy from a device
MOST_TOP_LOGPROBS = 20  # as OpenAI's
COLDEST = 1e-3  # below, float32 cannot hold the log-normaliser of logits / temperature to any useful precision
PRECISE = 1e6  # float32 holds log-normalisers up to it within 0.03; strong penalties and biases take them beyond


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. Raises InputError for a value out of its range.

    The order is Hugging Face's: bias, repetition penalty, temperature, top-k, top-p within the top-k, min-p. Among
    equal logits the lower token id comes first, so top-k keeps exactly k tokens.

    The repetition penalty counts the tokens of prompt and answer (as Hugging Face and vLLM), presence and frequency
    penalty those of the answer alone (as OpenAI and vLLM). They are subtracted behind the repetition penalty.
    """

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    repetition_penalty: float = 1.0  # 1: off
    seed: int | None = None  # None: fresh entropy
    presence_penalty: float = 0.0  # 0: off; subtracted from the logits of tokens that the answer holds
    frequency_penalty: float = 0.0  # 0: off; the same for each time that it holds them
    logit_bias: Mapping[int, float] | None = None  # token id → what is added to its logit; -inf bars it
    top_logprobs: int = 0  # how many of the likeliest tokens come with each token, with their log-probabilities
    candidates: int = 0  # the same for the router, the expert and their fusion, each alone: see `Likeliest`

    def __post_init__(self) -> None:
        temperature = real("temperature", self.temperature)
        if not (temperature == 0 or COLDEST <= temperature < math.inf):
            raise InputError(f"temperature is {temperature}, expected 0 or at least {COLDEST}: use 0 for greedy decoding.")
        if whole("top_k", self.top_k) < 0:
            raise InputError(f"top_k is {shown(self.top_k)}, expected 0 (off) or a positive number of tokens.")
        if not 0 < real("top_p", self.top_p) <= 1:
            raise InputError(f"top_p is {self.top_p}, expected a share above 0 and at most 1 (off).")
        if not 0 <= real("min_p", self.min_p) <= 1:
            raise InputError(f"min_p is {self.min_p}, expected a share from 0 (off) to 1.")
        if not 0 < real("repetition_penalty", self.repetition_penalty) < math.inf:
            raise InputError(f"repetition_penalty is {self.repetition_penalty}, expected a positive number; 1 turns it off.")
        if self.seed is not None and whole("seed", self.seed) < 0:
            raise InputError(f"seed is {shown(self.seed)}, expected a whole number from 0, or None for a fresh one.")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(real(name, getattr(self, name))):
                raise InputError(f"{name} is {getattr(self, name)}, expected a finite number; 0 turns it off.")
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", checked_bias(self.logit_bias))
        for name in ("top_logprobs", "candidates"):
            if not 0 <= whole(name, getattr(self, name)) <= MOST_TOP_LOGPROBS:
                raise InputError(f"{name} is {shown(getattr(self, name))}, expected 0 (off) to {MOST_TOP_LOGPROBS}.")

    @property
    def penalties(self) -> Penalties:
        """The penalties together."""
        return Penalties(self.repetition_penalty, self.presence_penalty, self.frequency_penalty)


class SamplingOptions(TypedDict, total=False):
    """The fields of `Sampling` as keyword arguments, for type checkers."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    top_logprobs: int
    candidates: int


def checked_bias(bias: object) -> dict[int, float]:
    """A copy of a `logit_bias`. Raises InputError for what is none."""
    if not isinstance(bias, Mapping):
        raise InputError(f"logit_bias is {shown(bias)}, expected a dict of token ids and numbers.")
    copy = {whole("A token id of logit_bias", id): real("A value of logit_bias", value) for id, value in bias.items()}
    if math.inf in copy.values():
        raise InputError("A value of logit_bias is inf, expected a finite number, or -inf to bar the token.")
    return copy


def sampling_of(options: Mapping[str, Any]) -> Sampling:
    """`Sampling` from keyword arguments. Raises InputError for an unknown name too."""
    check_names(options, tuple(Sampling.__dataclass_fields__))
    return Sampling(**options)


def sampler_of(
    sampling: Sampling, vocab: int, ends: Collection[int] = (), min_new_tokens: int = 0, masks: GrammarMasks | None = None
) -> "Sampler":
    """A sampler for one text, with a processor where the fusion graph's penalty is not enough.

    `ends`: tokens that are forbidden before the answer has `min_new_tokens`. `masks`: of a grammar. Raises InputError for a bias outside the
    vocabulary.
    """
    penalised = sampling.presence_penalty or sampling.frequency_penalty
    raw_rows = (sampling.top_logprobs or sampling.candidates) and sampling.repetition_penalty != 1  # the fusion graph's are penalised
    if not (sampling.logit_bias or penalised or raw_rows or min_new_tokens or masks):
        return Sampler(sampling)
    return Sampler(sampling, LogitsProcessor(vocab, sampling.logit_bias, sampling.penalties, ends, min_new_tokens, masks))


class Candidates(NamedTuple):
    """What the fusion graph returns for one position."""

    ids: npt.NDArray[np.int64]  # [k], in descending order of their logits, the lower id first among equals
    logits: npt.NDArray[np.float32]  # [k], fused and penalised, before the temperature
    log_normaliser: float  # logsumexp of logits / temperature over the vocabulary; at temperature 1 when greedy


Row = Callable[[], npt.NDArray[np.float32]]  # the full fused and penalised logits [V] of the same position


class Sampler:
    """Chooses tokens. A seed gives the same tokens whatever the number of candidates in each step."""

    def __init__(self, sampling: Sampling, processor: LogitsProcessor | None = None):
        """`processor` None: the fusion graph's penalty is all that changes logits."""
        self.sampling, self.processor = sampling, processor
        self._text = Occurrences()
        self.filtered = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
        self.random = np.random.default_rng(sampling.seed)

    def candidate_count(self, vocabulary: int) -> int:
        """How many candidates to ask the fusion graph for."""
        if self.sampling.temperature == 0:
            return 1
        return min(self.sampling.top_k or DEFAULT_CANDIDATES, vocabulary)

    def repeated(self, ids: Sequence[int], length: int, unchanged: int) -> npt.NDArray[np.int64]:
        """The tokens that the repetition penalty touches behind the first `length` ids: int64 [n], each once.

        The first `unchanged` ids are those of the last call, which overwrites what this one returns.
        """
        self._text.follow(ids, 0, length, unchanged)
        return self._text.ids

    def choose(self, candidates: Candidates, row: Row) -> int:
        """The id of the next token; `row` is called only if the candidates do not decide."""
        if self.sampling.temperature == 0:
            return int(candidates.ids[0])
        draw = self.random.random()  # one per step, whatever happens next
        ids, logits, log_normaliser = candidates
        rank = self._rank(logits, log_normaliser, draw, whole=False)
        if rank is None:
            ids, logits = _descending(row())
            rank = self._rank(logits, log_normaliser, draw, whole=True)
            assert rank is not None  # the whole vocabulary always decides
        return int(ids[rank])

    def distribution(self, candidates: Candidates, row: Row) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """What a filtered `choose` draws from at a temperature: ids int64 [n] and their probabilities float64 [n]."""
        ids, logits, log_normaliser = candidates
        count = self._filtered_count(logits, log_normaliser, whole=False)
        if count is None:
            ids, logits = _descending(row())
            count = self._filtered_count(logits, log_normaliser, whole=True)
        return self._head(ids, logits, count)

    def among(self, ids: npt.NDArray[np.int64], logits: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """`distribution` if these tokens [n], in descending order, were the whole vocabulary."""
        scaled, mass, _ = self._scaled(logits)
        return self._head(ids, logits, self._filter_prefix(scaled, mass, float(mass[-1]), whole=True))

    def _head(
        self, ids: npt.NDArray[np.int64], logits: npt.NDArray[np.float32], count: int | None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """The first `count` tokens with their probabilities among themselves."""
        weights = np.exp((logits[:count].astype(np.float64) - float(logits[0])) / self.sampling.temperature)
        return ids[:count].copy(), weights / weights.sum()

    def _filtered_count(self, logits: npt.NDArray[np.float32], log_normaliser: float, *, whole: bool) -> int | None:
        """How many of these descending logits the filters keep; None if that is more than there are here."""
        scaled, mass, first = self._scaled(logits)
        total = _total(mass, first, log_normaliser, whole=whole)
        return None if total is None else self._filter_prefix(scaled, mass, total, whole=whole)

    def _scaled(self, logits: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], float]:
        """Descending logits / temperature relative to the first, their weights' cumulative sum, and the first."""
        scaled = logits.astype(np.float64)
        scaled /= self.sampling.temperature
        first = float(scaled[0])
        scaled -= first
        return scaled, np.cumsum(np.exp(scaled)), first

    def _rank(self, logits: npt.NDArray[np.float32], log_normaliser: float, draw: float, *, whole: bool) -> int | None:
        """The rank that a uniform draw in [0, 1) falls on; None if more logits than these are needed to know.

        Every bound and sum below reads the descending logits from the first on. So it is the same number, bit for bit,
        for any number of candidates. Weights are relative to the first token's.
        """
        scaled, mass, first = self._scaled(logits)
        total = _total(mass, first, log_normaliser, whole=whole)
        if total is None:
            return None
        if self.filtered:
            count = self._filter_prefix(scaled, mass, total, whole=whole)
            if count is None:
                return None
            target = draw * mass[count - 1]
        else:
            # The normaliser comes in float32. Here it is a little too large, and the excess is shared out over all
            # tokens, which keeps the distribution exact. Too small, it would cut the tail off.
            total *= math.exp(1e-6 * max(10.0, abs(log_normaliser))) if abs(log_normaliser) <= PRECISE else 1.0
            count = len(mass)
            target = draw * total
            if target >= mass[-1]:
                if not whole:
                    return None
                target = (target - mass[-1]) / (total - mass[-1]) * mass[-1]
        return min(int(mass.searchsorted(target, side="right")), count - 1)

    def _filter_prefix(self, scaled: npt.NDArray[np.float64], mass: npt.NDArray[np.float64], total: float, *, whole: bool) -> int | None:
        """How many of the first tokens the filters keep; None if that is more than there are here."""
        sampling, available = self.sampling, len(scaled)
        count = sampling.top_k or available + 1  # available + 1: more than there are here
        if whole:
            count = min(count, available)
        if sampling.top_p < 1:
            if sampling.top_k:
                if count > available:  # the share is of the top-k's mass, which is unknown
                    return None
                total = float(mass[count - 1])
            count = min(count, int(mass.searchsorted(sampling.top_p * total)) + 1)
        if sampling.min_p > 0:
            above = int(np.count_nonzero(scaled >= math.log(sampling.min_p)))
            count = min(count, above if above < available else available + 1)
        if whole:
            return min(count, available)
        return count if count <= available else None


def _total(mass: npt.NDArray[np.float64], first: float, log_normaliser: float, *, whole: bool) -> float | None:
    """The sum of all weights relative to the first token's; None where only the whole row tells it."""
    if abs(log_normaliser) <= PRECISE:
        return math.exp(min(log_normaliser - first, 700.0))
    return float(mass[-1]) if whole else None


def _descending(row: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Ids [V] and logits [V] in descending order, the lower id first among equals."""
    # Float bits sort as integers once those of negative numbers are flipped. With the id in the lower half, one plain
    # sort is enough: three to four times as fast as a stable argsort of 256k logits. Adding 0 makes -0 equal to 0.
    bits = (row + np.float32(0)).view(np.int32)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (~order).astype(np.int64) << 32 | np.arange(len(row))
    keys.sort()
    ids = keys & 0xFFFFFFFF
    return ids, row[ids]
