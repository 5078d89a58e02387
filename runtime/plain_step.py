"""One plain decoding step: the router, the expert it chooses, the fusion of their logits, the choice of a token."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from fusionroute.runtime.backend import NO_IDS, Fused, FusionInputs, Output
from fusionroute.runtime.backends.greedy_fusion import as_greedy
from fusionroute.runtime.expert_guesses import ExpertGuesses
from fusionroute.runtime.loaded_system import LoadedSystem
from fusionroute.runtime.logits_processor import LogitsProcessor, Processed, ranked, top_logprobs
from fusionroute.runtime.numerics import Numerics, is_finite
from fusionroute.runtime.read_along import PassPrices, ReadAlong
from fusionroute.runtime.readers import Readers
from fusionroute.runtime.sampling import Candidates, Sampler
from fusionroute.runtime.text import Likeliest, Ranked, Token

ROUTER_ALONE = (1.0, 0.0)  # weights of router and expert


class PlainStep:
    """The steps of one session, and what the newest one leaves for the next."""

    def __init__(self, system: LoadedSystem, readers: Readers, prices: PassPrices | None = None):
        backend = system.backend
        self.readers, self.expert_names, self.vocab_size = readers, system.expert_names, system.vocab_size
        self.fuser, self._async_dispatch, self._guess_limit = backend.fuser(), backend.async_dispatch, backend.guess_limit
        self._apart, self._expect = backend.apart, backend.expect
        self._router_name = system.router_name
        self.numerics = Numerics((system.router_name, *system.expert_names), system.precision)
        self.failed: set[int] = set()  # experts for which the router answers, until a rewind
        self.newest: Fused | Processed | None = None  # what the newest token was chosen from
        self.guesses = ExpertGuesses()
        self._prices = prices
        self.restart()
        self.missed = False  # whether the newest token's expert was guessed wrongly
        self.router_logits: Any = None  # of the last step, float32 [1, V]; valid until the next pass
        self._no_routing = [math.nan] * len(self.expert_names)

    def restart(self) -> None:
        """Another text begins, or this one goes on elsewhere."""
        self.along = ReadAlong(self._prices)

    def advance(self, sampler: Sampler, coefficients: tuple[float, float], pinned: int | None = None) -> Token:
        """Choose and commit the next token. `Token.text` is left empty.

        `pinned`: use this expert instead of the routed one.

        The sequence must hold a token and have room for another: `Decoder.advance` and `Decoder.advance_some` see to
        it, for `Rounds` too.

        A model that has no say does not run: an expert whose logits have weight zero, and the router if neither its
        logits nor its choice count; routing is then NaN.

        Raises NumericalError for answers that are not finite: nothing is committed then.
        """
        if pinned in self.failed:
            coefficients = ROUTER_ALONE
        readers, length = self.readers, len(self.readers.sequence.ids)
        if sampler.processor is not None:
            self.prepare(sampler, length, length)
        newest = (length - 1,)

        def fused_with(answered: Output) -> Fused | Processed:
            router = answered if routed is None else routed  # a stand-in, of weight zero
            return self.fuse(router.logits, answered.logits, coefficients, sampler, length)

        if self._expect is not None and coefficients[1]:
            for expert in self.guesses.likely(readers.sequence.ids[-1])[:1] if pinned is None else (pinned,):
                self._expect(expert)
        guess = self.guess_expert() if pinned is None and coefficients[1] else pinned
        read = 0 if guess is None else min(readers.experts[guess].length, length - 1)
        router_reads = pinned is None or coefficients[0]
        near = self._near() if self._prices is not None and pinned is None and coefficients[1] else set()
        answers: dict[int, Output] = {}
        routed: Output | None
        answered: Output | None
        if together := self.along.readers(near):
            routed, answers = readers.read_together(newest, together)
            answered = None
        else:
            routed, answered = readers.read(newest if router_reads else None, guess if coefficients[1] else None, newest)
        self.router_logits = None if routed is None else routed.logits
        # queued behind the router, which may still run
        fused = fused_with(answered) if answered is not None and self._async_dispatch else None
        scores = self.routing_of(routed, 0)
        if routed is not None:
            self.numerics.check_routing(scores, length - 1)
        choice = scores.index(max(scores)) if pinned is None else pinned
        if choice != guess:
            if guess is not None and not together:  # what an expert reads, and in which passes, must not depend on guesses
                readers.experts[guess].truncate(read)
            answered = fused = None
        answered = answers.get(choice, answered)
        self.missed = guess is not None and choice != guess
        if choice in self.failed:
            coefficients = ROUTER_ALONE
        if answered is None:
            answered = routed if routed is not None and not coefficients[1] else readers.read_expert(choice, newest)
        fused = fused or fused_with(answered)
        if not is_finite(fused):
            raise self.numerics.fault(fused, routed and routed.logits, answered.logits, choice, length - 1)
        self.guesses.saw(readers.sequence.ids[-1], choice)
        if self._prices is not None:
            self.along.saw(readers.sequence.ids[-1], choice, near)
        logprob: float | Callable[[], float]
        if not sampler.sampling.temperature and (greedy := as_greedy(fused)) is not None:
            token, logprob = greedy.best, greedy.logprob
        else:
            token = sampler.choose(candidates(fused), lambda: fused.rows[0])
            logprob = self.logprob(token, fused, (routed or answered).logits, answered.logits, coefficients)
        likeliest = self.likeliest(fused, routed and routed.logits, answered.logits if coefficients[1] else None, sampler)
        readers.commit(token)
        name = self._router_name if choice in self.failed else self.expert_names[choice]
        alternatives = self.alternatives(fused, sampler.sampling.top_logprobs)
        return Token(token, name, logprob, scores, top_logprobs=alternatives, candidates=likeliest)

    def routing_of(self, routed: Output | None, row: int) -> list[float]:
        """The routing scores in a row of the router's output, one for each expert; NaN if it did not run."""
        return self._no_routing if routed is None or routed.routing is None else routed.routing[row].tolist()

    def guess_expert(self) -> int | None:
        """The expert to run before the routing is known: the likeliest that lags by no more than a guess may cost."""
        near = self._near()
        likely = self.guesses.likely(self.readers.sequence.ids[-1])
        return next((each for each in likely if each in near), None)

    def _near(self) -> set[int]:
        """The experts that may read before the routing is known: they lag by no more than a guess may cost."""
        if not self._guess_limit:
            return set()
        length, barred = len(self.readers.sequence.ids), self._apart | self.failed
        lags = {number: length - reader.length for number, reader in enumerate(self.readers.experts) if reader.length}
        return {number for number, lag in lags.items() if lag <= self._guess_limit} - barred

    def seconds(self, pinned: int | None) -> float | None:
        """Of a step's passes, where all near experts read along; None where a wrong guess costs a pass more."""
        prices = self._prices
        return prices.every if pinned is None and prices is not None and self.along.readers(self._near()) else None

    def fuse(
        self, router: Any, expert: Any, coefficients: tuple[float, float], sampler: Sampler, length: int, count: int = 0
    ) -> Fused | Processed:
        """Fuse logits float32 [1, V] at one position, behind the first `length` tokens, and process them.

        `count`: candidates; 0: as the sampler needs.
        """
        sampling, processor, sequence = sampler.sampling, sampler.processor, self.readers.sequence
        self.newest = None  # a fusion that nobody holds any more leaves nothing to compute
        count = count or sampler.candidate_count(self.vocab_size)
        temperature, penalised = sampling.temperature or 1.0, NO_IDS
        if processor is not None:
            self.prepare(sampler, length, length)
            self.newest = processor.process(self.fuser(FusionInputs(router, expert, coefficients)), count, temperature)
        else:
            if sampling.repetition_penalty != 1.0:
                penalised = sampler.repeated(sequence.ids, length, sequence.unchanged)
                sequence.unchanged = len(sequence.ids)
            inputs = FusionInputs(router, expert, coefficients, count, penalised, sampling.repetition_penalty, temperature)
            self.newest = self.fuser(inputs)
        return self.newest

    def prepare(self, sampler: Sampler, first: int, last: int) -> None:
        """Let what may stand behind the first `first` … `last` tokens be computed while models run."""
        sequence = self.readers.sequence
        if (processor := self._following(sampler, first)) is not None:
            processor.prepare(sequence.ids, sequence.answer_start, first, last)

    def accepted(self, sampler: Sampler, drafts: list[int]) -> list[int]:
        """The first of some drafts that may stand behind the text."""
        sequence = self.readers.sequence
        processor = self._following(sampler, len(sequence.ids))
        return drafts if processor is None else processor.accepted(sequence.ids, sequence.answer_start, drafts)

    def complete(self, sampler: Sampler) -> bool:
        """Whether nothing may stand behind the text."""
        sequence = self.readers.sequence
        processor = self._following(sampler, len(sequence.ids))
        return processor is not None and processor.complete(sequence.ids, sequence.answer_start)

    def _following(self, sampler: Sampler, length: int) -> LogitsProcessor | None:
        """The sampler's processor, told of the text up to `length`."""
        sequence, processor = self.readers.sequence, sampler.processor
        if processor is not None:
            processor.follow(sequence.ids, sequence.answer_start, length, sequence.unchanged)
            sequence.unchanged = len(sequence.ids)
        return processor

    def newest_row(self) -> npt.NDArray[np.float32]:
        """What the newest token was chosen from, float32 [V]: an array for the caller."""
        assert self.newest is not None
        return self.newest.rows[0].copy() if isinstance(self.newest, Processed) else self.fuser.row(self.newest)

    def alternatives(self, fused: Fused | Processed, count: int) -> Ranked:
        """The `count` likeliest tokens of a fusion, before it was processed."""
        if not count:
            return ()
        row = fused.raw if isinstance(fused, Processed) else np.asarray(fused.rows)[0]
        return top_logprobs(row, float(fused.log_normaliser[0]), count)

    def likeliest(self, fused: Fused | Processed, router: Any, expert: Any, sampler: Sampler) -> Likeliest | None:
        """The `Token.candidates` of a token that was chosen from a fusion.

        Logits [1, V] of the router and the expert, None where one did not run.
        """
        count = sampler.sampling.candidates
        if not count:
            return None
        of_fusion = self.alternatives(fused, count)  # first: the fuser may use its buffers again
        alone = [() if logits is None else ranked(self.fuser.logits(logits)[0], count) for logits in (router, expert)]
        return Likeliest(alone[0], alone[1], of_fusion)

    def logprob(self, token: int, fused: Fused | Processed, router: Any, expert: Any, coefficients: tuple[float, float]) -> float:
        """Log-probability of a token in the fused distribution at temperature 1, without penalty.

        Logits are float32 [1, V].
        """
        if isinstance(fused, Processed):
            return float(fused.raw[token]) - float(fused.log_normaliser[0])
        place = np.flatnonzero(fused.ids[0] == token)
        if len(place):
            logit = float(fused.unpenalised[0, place[0]])
        else:  # chosen from beyond the candidates
            logit = sum(
                weight * float(self.fuser.logits(logits)[0, token])
                for weight, logits in zip(coefficients, (router, expert), strict=True)
                if weight
            )
        return logit - float(fused.log_normaliser[0])


def candidates(fused: Fused | Processed) -> Candidates:
    """The candidates at the only position of a fusion."""
    return Candidates(fused.ids[0], fused.logits[0], float(fused.sampling_normaliser[0]))
