"""A round of speculation: draft tokens, let each chosen expert verify its positions in one pass, keep what holds.

A draft of the router costs a router step, which also says which expert answers (the router is a language model of the
same vocabulary). Drafts looked up in the text are free, and router and experts read them in one pass each. That pass of
an expert is also its catch-up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise, takewhile
from typing import Any

import numpy as np

from fusionroute.runtime.backend import Fused, Output, room_for
from fusionroute.runtime.limits import MAX_ROUND_TOKENS
from fusionroute.runtime.logits_processor import Processed
from fusionroute.runtime.numerics import is_finite
from fusionroute.runtime.plain_step import ROUTER_ALONE, PlainStep, candidates
from fusionroute.runtime.sampling import DEFAULT_CANDIDATES, Sampler
from fusionroute.runtime.speculation.costs import Costs
from fusionroute.runtime.speculation.draft_planner import DraftPlan, DraftPlanner
from fusionroute.runtime.speculation.lookup import Lookup
from fusionroute.runtime.speculation.rejection import Distribution, Softmax, certain, verify
from fusionroute.runtime.text import Token

# at one row: logits [1, V] of the router (where it did not run, a stand-in of weight zero) and of the expert, coefficients
Answer = tuple[Any, Any, tuple[float, float]]
DRAFT_MARGIN = 8.0  # below the best logit / temperature a token is not drafted: it weighs less than e⁻⁸ of the best
DEVICE_LEARNING_INTERVAL = 16  # tokens between two copies of logits from a device to learn from


class Rounds:
    """Speculation for one session, with buffers of its own and what it learned from the text so far."""

    def __init__(self, step: PlainStep, costs: Costs, eos: frozenset[int], exact: bool):
        self._step, self._readers, self._sequence = step, step.readers, step.readers.sequence
        self._costs, self._eos, self._exact = costs, eos, exact
        self._rows: Any = None  # of the router, which reuses its own
        self.clear()

    def clear(self) -> None:
        """Another text begins."""
        self._lookup, self.planner = Lookup(), DraftPlanner(self._costs, self._exact)
        self._pays = self.planner.pays
        self.drafted = self.accepted = self._unseen = 0

    def advance(self, sampler: Sampler, coefficients: tuple[float, float], pinned: int | None, most: int) -> list[Token]:
        """Choose and commit one to `most` tokens, distributed as those of `PlainStep`; greedy ones are the same."""
        step, ids = self._step, self._sequence.ids
        if not self._pays or step.failed:
            return [step.advance(sampler, coefficients, pinned)]
        start, previous = len(ids), step.guesses.last
        offered = step.accepted(sampler, self._lookup.propose(ids, min(most, MAX_ROUND_TOKENS) - 1))
        likely = pinned if pinned is not None else previous or 0
        router_runs = pinned is None or bool(coefficients[0])
        plan = self.planner.plan(most, len(offered), router_runs, likely if coefficients[1] else None, start, step.seconds(pinned))
        if plan.rows == 1:
            tokens = [step.advance(sampler, coefficients, pinned)]
            router_rows = step.router_logits
        else:
            tokens, router_rows = self._speculate(sampler, coefficients, pinned, plan, offered)
        if plan.rows == 1 or plan.source != "lookup":
            self.planner.saw("lookup", agreeing(tokens, offered), min(len(offered), len(tokens)))
        if coefficients[1] and router_rows is not None and (plan.rows == 1 or plan.source != "router"):
            self._learn_router_rate(tokens, router_rows, bool(sampler.sampling.temperature))
        experts = [previous, *(step.expert_names.index(token.expert) for token in tokens)]
        self.planner.produced(len(tokens), sum(a is not None and a != b for a, b in pairwise(experts)), step.missed)
        return tokens

    def _speculate(
        self, sampler: Sampler, coefficients: tuple[float, float], pinned: int | None, plan: DraftPlan, offered: list[int]
    ) -> tuple[list[Token], Any]:
        """Carry out a plan that drafts, commit its tokens, and learn from them.

        The tokens, and the router's logits as `_round` has them.
        """
        start, step = len(self._sequence.ids), self._step
        tokens: list[Token] = []
        try:
            tokens, drafts, router_rows = self._round(sampler, coefficients, pinned, plan, offered)
        finally:  # all tokens but the last are drafts that held; other drafts are forgotten, whatever happened
            self._readers.truncate(start + max(len(tokens) - 1, 0))
        for behind, token in zip(self._sequence.ids[start - 1 :], tokens, strict=True):
            step.guesses.saw(behind, step.expert_names.index(token.expert))
        self._readers.commit(tokens[-1].id)
        accepted = agreeing(tokens, drafts)
        self.planner.saw(plan.source, accepted, len(drafts))
        self.drafted, self.accepted = self.drafted + len(drafts), self.accepted + accepted
        return tokens, router_rows

    def _learn_router_rate(self, tokens: list[Token], rows: Any, sampled: bool) -> None:
        """Learn whether the router would have drafted these tokens, from its logits [≥ len(tokens), V]."""
        self._unseen += 1
        if not isinstance(rows, np.ndarray) and self._unseen % DEVICE_LEARNING_INTERVAL:
            return
        logits = self._step.fuser.logits(rows)[: len(tokens)]
        ids = [token.id for token in tokens]
        if not sampled:
            hits = float(np.count_nonzero(logits.argmax(-1) == ids))
        else:  # tokens come from p: the mean of min(1, q/p) over them is the acceptance rate
            peaks = logits.max(-1)
            q = logits[range(len(ids)), ids] - peaks - np.log(np.exp(logits - peaks[:, None]).sum(-1))
            hits = float(np.exp(np.minimum(q - [token.logprob for token in tokens], 0.0)).sum())
        self.planner.rates["router"].saw(hits, len(tokens))

    def _round(
        self, sampler: Sampler, coefficients: tuple[float, float], pinned: int | None, plan: DraftPlan, offered: list[int]
    ) -> tuple[list[Token], list[int], Any]:
        """The tokens of a round, its drafts, and the router's logits [rows, V] (None if it did not run).

        Leaves the drafts at the end of the session's tokens. Nothing is read behind a draft that ends the text.
        """
        step, start = self._step, len(self._sequence.ids)
        routed: Output | None
        guess = self._guess(pinned) if coefficients[1] else None
        read = 0 if guess is None else min(self._readers.experts[guess].length, start - 1)
        if plan.source == "lookup":
            drafts, count = self._append_drafts(offered[: plan.rows - 1])
            distributions = [certain(draft) for draft in drafts]
            rows = range(start - 1, start - 1 + count)
            step.prepare(sampler, start, start + count - 1)
            routed, answered = self._readers.read(rows if pinned is None or coefficients[0] else None, guess, rows)
        else:
            routed, answered, drafts, distributions = self._draft(sampler, plan.rows, guess)
            count = len(routed.logits)
        if pinned is not None:
            choices = [pinned] * count
        else:
            assert routed is not None and routed.routing is not None
            choices = [int(choice) for choice in routed.routing.argmax(-1)]
        step.missed = guess is not None and choices[0] != guess
        answers: dict[int, Answer] = {}  # by row
        if not coefficients[1]:
            assert routed is not None
            answers = self._ahead(routed, routed, coefficients, range(count))
        elif guess is not None and answered is not None:
            own = [row for row in range(count) if choices[row] == guess]
            answers = self._ahead(answered if routed is None else routed, answered, coefficients, own)
            self._readers.experts[guess].truncate(start + own[-1] if own else read)  # see `PlainStep.advance`
        tokens: list[Token] = []
        for row, choice in enumerate(choices):
            if routed is not None and routed.routing is not None:
                step.numerics.check_routing(step.routing_of(routed, row), start + row - 1)
            if row not in answers:
                answers |= self._answers(choices, row, start, routed, coefficients)
            router, expert, weights = answers[row]
            drafted = row < len(drafts)
            drawing = drafted and sampler.sampling.temperature > 0
            single = 1 if drawing and not sampler.filtered else 0  # one candidate: the full row is read anyway
            fused = step.fuse(router, expert, weights, sampler, start + row, single)
            # of what was fused ahead, which does not tell whose logits they are
            router_alone = None if routed is None else routed.logits[row : row + 1]
            expert_alone = answered.logits[row : row + 1] if choice == guess and answered is not None else expert
            if not is_finite(fused):
                raise step.numerics.fault(fused, router_alone, expert_alone, choice, start + row - 1)
            if drawing:
                token = verify(target(sampler, fused), distributions[row], drafts[row], sampler.random)
            else:
                token = sampler.choose(candidates(fused), lambda fused=fused: fused.rows[0])  # type: ignore[misc]
            logprob = step.logprob(token, fused, router, expert, weights)
            likeliest = step.likeliest(fused, router_alone, expert_alone if coefficients[1] else None, sampler)
            routing, alternatives = step.routing_of(routed, row), step.alternatives(fused, sampler.sampling.top_logprobs)
            name = step.expert_names[choice]
            tokens.append(Token(token, name, logprob, routing, top_logprobs=alternatives, candidates=likeliest))
            if drafted and token != drafts[row]:
                break
        return tokens, drafts, None if routed is None else routed.logits

    def _guess(self, pinned: int | None) -> int | None:
        """The expert that reads in the router's passes."""
        return self._step.guess_expert() if pinned is None and self._readers.joint else pinned

    def _append_drafts(self, drafts: list[int]) -> tuple[list[int], int]:
        """Append looked-up drafts up to one that ends the text; those, and how many rows they need."""
        end = next((place for place, draft in enumerate(drafts) if draft in self._eos), None)
        drafts = drafts if end is None else drafts[: end + 1]
        self._sequence.ids += drafts
        return drafts, len(drafts) + (end is None)

    def _ahead(self, routed: Output, answered: Output, coefficients: tuple[float, float], own: Iterable[int]) -> dict[int, Answer]:
        """What to fuse at some of the rows that both answer."""
        router, expert, weights = self._step.fuser.ahead(routed.logits, answered.logits, coefficients)
        return {row: (router[row : row + 1], expert[row : row + 1], weights) for row in own}

    def _answers(
        self, choices: Sequence[int], row: int, start: int, routed: Output | None, coefficients: tuple[float, float]
    ) -> dict[int, Answer]:
        """Let the expert of a row read up to the last row that it answers; what to fuse by row."""
        own = [other for other in range(row, len(choices)) if choices[other] == choices[row]]
        expert = self._readers.read_expert(choices[row], [start - 1 + other for other in own]).logits
        rows = {other: expert[place : place + 1] for place, other in enumerate(own)}
        return {
            other: (logits if routed is None else routed.logits[other : other + 1], logits, coefficients) for other, logits in rows.items()
        }

    def _draft(self, sampler: Sampler, rows: int, guess: int | None) -> tuple[Output, Output | None, list[int], list[Distribution]]:
        """Let the router go on alone for `rows` steps.

        Each but the last drafts a token: its likeliest, or one drawn from `proposal`. In the last one the guessed
        expert reads all rows, if the backend has joint passes: its output.
        """
        step, ids = self._step, self._sequence.ids
        start, answered = len(ids), None
        drafts: list[int] = []
        distributions: list[Distribution] = []
        routing = np.empty((rows, len(step.expert_names)), np.float32)
        for place in range(rows):
            step.prepare(sampler, len(ids), len(ids))
            verifier = guess if place == rows - 1 and self._readers.joint else None
            output, answered = self._readers.read((len(ids) - 1,), verifier, range(start - 1, len(ids)))
            assert output is not None and output.routing is not None
            if self._rows is None:
                self._rows = room_for(output.logits, MAX_ROUND_TOKENS, step.vocab_size)
            self._rows[place : place + 1] = output.logits
            routing[place] = output.routing[0]
            if place == rows - 1:
                break
            logits = self._rows[place : place + 1]
            row = step.fuser.logits(logits)[0]
            step.numerics.check_router_logit(row[best := int(row.argmax())], len(ids) - 1)
            if sampler.processor is not None or sampler.sampling.repetition_penalty != 1.0:
                row = step.fuse(logits, logits, ROUTER_ALONE, sampler, len(ids), 1).rows[0]
                best = int(row.argmax())
            if sampler.sampling.temperature:
                distributions.append(proposal(sampler, row, row[best]))
                drafts.append(distributions[-1].draw(sampler.random.random()))
            else:
                drafts.append(best)
            ids.append(drafts[-1])
            if drafts[-1] in self._eos:
                break
        return Output(self._rows[: place + 1], routing[: place + 1]), answered, drafts, distributions


def agreeing(tokens: list[Token], drafts: list[int]) -> int:
    """How many drafts in a row are the tokens that were chosen."""
    return sum(takewhile(bool, (token.id == draft for token, draft in zip(tokens, drafts, strict=False))))


def target(sampler: Sampler, fused: Fused | Processed) -> Distribution | Softmax:
    """What sampling draws from at the only position."""
    if not sampler.filtered:
        return Softmax(fused.rows[0], sampler.sampling.temperature, float(fused.sampling_normaliser[0]))
    return Distribution(*sampler.distribution(candidates(fused), lambda: fused.rows[0]))


def proposal(sampler: Sampler, row: np.ndarray, peak: float) -> Distribution:
    """What a draft is drawn from: what sampling would draw from if the likeliest of the router's logits [V] were all.

    peak: the largest of them.

    Any distribution may propose. This one is as good as the router's own and needs no exponential of the whole
    vocabulary.
    """
    ids = np.flatnonzero(row >= peak - np.float32(DRAFT_MARGIN * sampler.sampling.temperature))
    if len(ids) > DEFAULT_CANDIDATES:
        ids = np.sort(ids[np.argpartition(row[ids], -DEFAULT_CANDIDATES)[-DEFAULT_CANDIDATES:]])
    ids = ids[np.argsort(-row[ids], kind="stable")]
    return Distribution(*sampler.among(ids, row[ids]))
