"""One round of speculation: draft some tokens ahead, let every chosen expert verify its positions in one chunk, keep what holds.

The router's drafts cost a step of its own each, in which it also says which expert answers (it is a language model of the same vocabulary);
drafts looked up in the text cost nothing, and router and experts read them in chunks. An expert's chunk is its catch-up at the same time.
"""

from __future__ import annotations

from itertools import pairwise, takewhile
from typing import TYPE_CHECKING, Any

import numpy as np

from fusionroute.runtime.backend import Fused, Output
from fusionroute.runtime.sampling import CANDIDATES, Candidates, Sampler
from fusionroute.runtime.speculation.costs import MOST, Costs
from fusionroute.runtime.speculation.draft_planner import Pace, Plan
from fusionroute.runtime.speculation.lookup import Lookup
from fusionroute.runtime.speculation.rejection import Distribution, Softmax, certain, verify
from fusionroute.runtime.text import Token

if TYPE_CHECKING:
    from fusionroute.runtime.session import Session

REACH = 8.0  # below the best logit / temperature, from where on a token is not drafted: it weighs less than e⁻⁸ of the best
APART = 16  # tokens after which logits that are on a device are worth a copy for `Rounds._compare`


class Rounds:
    """Speculation for one session, with buffers of its own and what it learned from the text so far."""

    def __init__(self, session: Session, costs: Costs, vocab: int, eos: frozenset[int]):
        self._session = session
        self._costs, self._eos = costs, eos
        self._rows = np.empty((MOST, vocab), np.float32)  # the router's logits, of which each step overwrites the last
        self.clear()

    def clear(self) -> None:
        """Another text begins."""
        self._lookup, self.pace = Lookup(), Pace(self._costs, self._session.exact)
        self._pays = self.pace.pays
        self.drafted = self.accepted = self._unseen = 0

    def advance(self, sampler: Sampler, coefficients: tuple[float, float], pinned: int | None, most: int) -> list[Token]:
        """Choose and append one to `most` tokens, distributed as those of `Session.advance`, which are the same ones when greedy."""
        session = self._session
        if not self._pays:
            return [session.advance(sampler, coefficients, pinned)]
        start, previous = len(session.tokens), session.last
        offered = self._lookup.propose(session.tokens, min(most, MOST) - 1)
        likely = pinned if pinned is not None else previous or 0
        plan = self.pace.plan(
            most, len(offered), pinned is None or bool(coefficients[0]), likely if coefficients[1] else None, len(session.tokens)
        )
        drafts: list[int] = []
        if plan.rows == 1:
            found = [session.advance(sampler, coefficients, pinned)]
            rows = session.routed
        else:
            found = []
            try:
                found, drafts, rows = self._round(sampler, coefficients, pinned, plan, offered)
            finally:  # all but the last are drafts that held; others are forgotten, whatever happened
                session.keep(start + max(len(found) - 1, 0))
            session.commit(found[-1])
            accepted = held(found, drafts)
            self.pace.saw(plan.source, accepted, len(drafts))
            self.drafted, self.accepted = self.drafted + len(drafts), self.accepted + accepted
        if plan.rows == 1 or plan.source != "lookup":
            self.pace.saw("lookup", held(found, offered), min(len(offered), len(found)))
        if coefficients[1] and rows is not None and (plan.rows == 1 or plan.source != "router"):
            self._compare(found, rows, bool(sampler.sampling.temperature))
        names = [previous, *(session.names.index(token.expert) for token in found)]
        self.pace.produced(len(found), sum(a is not None and a != b for a, b in pairwise(names)))
        return found

    def _compare(self, found: list[Token], rows: Any, sampled: bool) -> None:
        """Learn from tokens that the router did not draft whether it would have: its logits [≥ len(found), V] are there anyway."""
        self._unseen += 1
        if not isinstance(rows, np.ndarray) and self._unseen % APART:
            return
        own = np.asarray(rows)[: len(found)]
        ids = [token.id for token in found]
        if not sampled:
            hits = float(np.count_nonzero(own.argmax(-1) == ids))
        else:  # tokens come from p: the mean of min(1, q/p) over them is the acceptance rate
            tops = own.max(-1)
            q = own[range(len(ids)), ids] - tops - np.log(np.exp(own - tops[:, None]).sum(-1))
            hits = float(np.exp(np.minimum(q - [token.logprob for token in found], 0.0)).sum())
        self.pace.rates["router"].saw(hits, len(found))

    def _round(
        self, sampler: Sampler, coefficients: tuple[float, float], pinned: int | None, plan: Plan, offered: list[int]
    ) -> tuple[list[Token], list[int], Any]:
        """The tokens of a round, its drafts, and the router's logits [rows, V] (None where it did not run).

        Leaves the drafts at the end of the session's tokens. Nothing is read behind a draft that ends the text.
        """
        session, start = self._session, len(self._session.tokens)
        routed: Output | None = None
        if plan.source == "lookup":
            drafts = offered[: plan.rows - 1]
            end = next((at for at, draft in enumerate(drafts) if draft in self._eos), None)
            drafts = drafts if end is None else drafts[: end + 1]
            drawn = [certain(draft) for draft in drafts]
            count = len(drafts) + (end is None)
            session.tokens += drafts
            if pinned is None or coefficients[0]:
                routed = session.read(None, range(start - 1, start - 1 + count))
        else:
            routed, drafts, drawn = self._draft(sampler, plan.rows)
            count = len(routed.logits)
        routing = None if routed is None else routed.routing
        if pinned is not None:
            choices = [pinned] * count
        else:
            assert routing is not None
            choices = [int(choice) for choice in routing.argmax(-1)]
        answers: dict[int, Any] = {}  # position → the chosen expert's logits, float32 [1, V]
        found: list[Token] = []
        for row, choice in enumerate(choices):
            router = None if routed is None else routed.logits[row : row + 1]
            if not coefficients[1]:
                assert router is not None
                answers[row] = router
            elif row not in answers:  # the chosen expert reads up to its last draft; one whose turn never comes does not run
                mine = [other for other in range(row, count) if choices[other] == choice]
                rows = session.read(choice, [start - 1 + other for other in mine]).logits
                answers |= {other: rows[at : at + 1] for at, other in enumerate(mine)}
            expert = answers[row]
            drawing = row < len(drafts) and sampler.sampling.temperature > 0
            few = drawing and not sampler.filtered  # then the row says all
            fused = session.fused(router if router is not None else expert, expert, coefficients, sampler, start + row, few)
            if drawing:
                token = verify(target(sampler, fused), drawn[row], drafts[row], sampler.random)
            else:
                token = sampler.choose(candidates(fused), lambda fused=fused: fused.rows[0])  # type: ignore[misc]
            scores = (session.unrouted if routing is None else routing[row]).copy()
            found.append(Token(token, session.names[choice], session.logprob(token, fused, router, expert, coefficients), scores))
            if row < len(drafts) and token != drafts[row]:
                break
        return found, drafts, None if routed is None else routed.logits

    def _draft(self, sampler: Sampler, rows: int) -> tuple[Output, list[int], list[Distribution]]:
        """Let the router go on alone for so many steps; each but the last gives a draft: its likeliest token, or one drawn from `proposal`."""
        session = self._session
        drafts: list[int] = []
        drawn: list[Distribution] = []
        routing = np.empty((rows, len(session.names)), np.float32)
        for place in range(rows):
            answer = session.read(None, [len(session.tokens) - 1])
            own = self._rows[place : place + 1]
            own[...] = answer.logits
            assert answer.routing is not None
            routing[place] = answer.routing[0]
            if place == rows - 1:
                break
            row = own[0]
            if sampler.sampling.repetition_penalty != 1.0:
                row = session.fused(own, own, (1.0, 0.0), sampler, len(session.tokens), single=True).rows[0]
            if sampler.sampling.temperature:
                drawn.append(proposal(sampler, row))
                drafts.append(drawn[-1].draw(sampler.random.random()))
            else:
                drafts.append(int(row.argmax()))
            session.tokens.append(drafts[-1])
            if drafts[-1] in self._eos:
                break
        return Output(self._rows[: place + 1], routing[: place + 1]), drafts, drawn


def held(found: list[Token], drafts: list[int]) -> int:
    """How many drafts in a row are the tokens that were found."""
    return sum(takewhile(bool, (token.id == draft for token, draft in zip(found, drafts, strict=False))))


def candidates(fused: Fused) -> Candidates:
    """Those of the only position."""
    return Candidates(fused.ids[0], fused.logits[0], float(fused.sampling_normaliser[0]))


def target(sampler: Sampler, fused: Fused) -> Distribution | Softmax:
    """What sampling draws from at the only position."""
    if not sampler.filtered:
        return Softmax(fused.rows[0], sampler.sampling.temperature, float(fused.sampling_normaliser[0]))
    return Distribution(*sampler.distribution(candidates(fused), lambda: fused.rows[0]))


def proposal(sampler: Sampler, row: np.ndarray) -> Distribution:
    """What a draft is drawn from: what sampling would draw from if the likeliest of the router's logits [V] were all.

    Any distribution may propose. This one is as good as the router's own and takes no exponential of the whole vocabulary.
    """
    ids = np.flatnonzero(row >= row.max() - np.float32(REACH * sampler.sampling.temperature))
    if len(ids) > CANDIDATES:
        ids = np.sort(ids[np.argpartition(row[ids], -CANDIDATES)[-CANDIDATES:]])
    ids = ids[np.argsort(-row[ids], kind="stable")]
    return Distribution(*sampler.among(ids, row[ids]))
