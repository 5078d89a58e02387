"""One plain decoding step: the router, the expert it chooses, the fusion of their logits, the choice of a token."""

from __future__ import annotations

from typing import Any

import numpy as np

from fusionroute.runtime.backend import NO_IDS, Fused, FusionInputs, Output
from fusionroute.runtime.loaded_system import LoadedSystem
from fusionroute.runtime.readers import Readers
from fusionroute.runtime.sampling import Candidates, Sampler
from fusionroute.runtime.text import Token


class PlainStep:
    """The steps of one session, and what the newest one leaves for the next."""

    def __init__(self, system: LoadedSystem, readers: Readers):
        backend = system.backend
        self.readers, self.expert_names, self.vocab_size = readers, system.expert_names, system.vocab_size
        self.fuser, self._async_dispatch = backend.fuser(), backend.async_dispatch
        self.newest: Fused | None = None  # what the newest token was chosen from
        self.last_expert: int | None = None  # the expert of the newest token
        self.router_logits: Any = None  # of the last step, float32 [1, V]; valid until the next pass
        self._no_routing = np.full(len(self.expert_names), np.nan, np.float32)

    def advance(self, sampler: Sampler, coefficients: tuple[float, float], pinned: int | None = None) -> Token:
        """Choose and commit the next token. `Token.text` is left empty.

        `pinned`: use this expert instead of the routed one.

        The sequence must hold a token and have room for another: `Decoder.advance` and `Decoder.advance_some` see to
        it, for `Rounds` too.

        A model that has no say does not run: an expert whose logits have weight zero, and the router if neither its
        logits nor its choice count; routing is then NaN.
        """
        length = len(self.readers.sequence.ids)

        def fused_with(expert: int) -> tuple[Output, Output, Fused]:
            answered = self.readers.read_expert(expert, newest) if routed is None or coefficients[1] else routed
            router = routed or answered  # a stand-in, of weight zero
            return router, answered, self.fuse(router.logits, answered.logits, coefficients, sampler, length)

        newest = (length - 1,)
        routed = self.readers.router.read(newest) if pinned is None or coefficients[0] else None
        self.router_logits = None if routed is None else routed.logits
        guess = self.guess_expert() if pinned is None and coefficients[1] else pinned
        outputs = fused_with(guess) if guess is not None else None  # queued behind the router, which may still run
        routing = self.routing_of(routed)
        choice = int(routing.argmax()) if pinned is None else pinned
        if choice != guess:
            if guess is not None:  # what an expert reads, and in which passes, must not depend on guesses
                self.readers.experts[guess].truncate(length - 1)
            outputs = None
        router, answered, fused = outputs or fused_with(choice)
        self.last_expert = choice
        token = sampler.choose(candidates(fused), lambda: fused.rows[0])
        logprob = self.logprob(token, fused, router.logits, answered.logits, coefficients)
        self.readers.commit(token)
        return Token(token, self.expert_names[choice], logprob, routing)

    def routing_of(self, routed: Output | None, row: int = 0) -> np.ndarray:
        """A copy of the routing scores in a row of the router's output, float32 [n_experts]; NaN if it did not run."""
        scores = self._no_routing if routed is None or routed.routing is None else routed.routing[row]
        return np.array(scores)

    def guess_expert(self) -> int | None:
        """The expert to run before the routing is known, if models run concurrently: the last one, unless it lags."""
        if not self._async_dispatch or self.last_expert is None:
            return None
        lags = self.readers.experts[self.last_expert].length < max(len(self.readers.sequence.ids) - 1, 1)
        return None if lags else self.last_expert

    def fuse(self, router: Any, expert: Any, coefficients: tuple[float, float], sampler: Sampler, length: int, count: int = 0) -> Fused:
        """Fuse logits float32 [1, V] at one position, behind the first `length` tokens.

        `count`: candidates; 0: as the sampler needs.
        """
        sampling = sampler.sampling
        penalised = NO_IDS
        if sampling.repetition_penalty != 1.0:
            penalised = np.unique(np.asarray(self.readers.sequence.ids[:length], np.int64))
        count = count or sampler.candidate_count(self.vocab_size)
        self.newest = self.fuser(
            FusionInputs(router, expert, coefficients, count, penalised, sampling.repetition_penalty, sampling.temperature or 1.0)
        )
        return self.newest

    def logprob(self, token: int, fused: Fused, router: Any, expert: Any, coefficients: tuple[float, float]) -> float:
        """Log-probability of a token in the fused distribution at temperature 1, without penalty.

        Logits are float32 [1, V].
        """
        place = np.flatnonzero(fused.ids[0] == token)
        if len(place):
            logit = float(fused.unpenalised[0, place[0]])
        else:  # chosen from beyond the candidates
            logit = sum(weight * float(logits[0, token]) for weight, logits in zip(coefficients, (router, expert), strict=True) if weight)
        return logit - float(fused.log_normaliser[0])


def candidates(fused: Fused) -> Candidates:
    """The candidates at the only position of a fusion."""
    return Candidates(fused.ids[0], fused.logits[0], float(fused.sampling_normaliser[0]))
