"""One round of speculation: draft some tokens ahead, let every chosen expert verify its positions in one chunk, keep what holds.

The router's drafts cost a step of its own each, in which it also says which expert answers (it is a language model of the same vocabulary);
drafts looked up in the text cost nothing, and router and experts read them in chunks. An expert's chunk is its catch-up at the same time.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.backends.backend import Fused, Output
from runtime.sampling import Candidates, Sampler
from runtime.speculation.costs import MOST, Costs
from runtime.speculation.lookup import Lookup
from runtime.speculation.pace import Pace, Plan
from runtime.speculation.rejection import Distribution, certain, verify
from runtime.text import Token

if TYPE_CHECKING:
    from runtime.session import Session


class Rounds:
    """Speculation for one session, with buffers of its own and what it learned from the text so far."""

    def __init__(self, session: Session, costs: Costs, vocab: int):
        self._session = session
        self._costs = costs
        self._rows = np.empty((MOST, vocab), np.float32)  # the router's logits, of which each step overwrites the last
        self.clear()

    def clear(self) -> None:
        """Another text begins."""
        self._lookup, self.pace = Lookup(), Pace(self._costs)
        self.drafted = self.accepted = 0

    def advance(self, sampler: Sampler, coefficients: tuple[float, float], pinned: int | None, most: int) -> list[Token]:
        """Choose and append one to `most` tokens, distributed as those of `Session.advance`, which are the same ones when greedy."""
        session = self._session
        start, previous = len(session.tokens), session.last
        offered = self._lookup.propose(session.tokens, min(most, MOST) - 1)
        plan = self.pace.plan(most, len(offered), pinned is None or bool(coefficients[0]), bool(coefficients[1]))
        if plan.rows == 1:
            found = [session.advance(sampler, coefficients, pinned)]
        else:
            accepted = 0
            try:
                found, accepted = self._round(sampler, coefficients, pinned, plan, offered)
            finally:
                session.keep(start + accepted)
            session.commit(found[-1])
            self.pace.saw(plan.source, accepted, plan.rows - 1)
            self.drafted, self.accepted = self.drafted + plan.rows - 1, self.accepted + accepted
        names = [previous, *(session.names.index(token.expert) for token in found)]
        self.pace.produced(len(found), sum(a is not None and a != b for a, b in pairwise(names)))
        return found

    def _round(
        self, sampler: Sampler, coefficients: tuple[float, float], pinned: int | None, plan: Plan, offered: list[int]
    ) -> tuple[list[Token], int]:
        """The tokens of a round and how many drafts were accepted. Leaves the drafts at the end of the session's tokens."""
        session, start = self._session, len(self._session.tokens)
        routed: Output | None = None
        if plan.source == "lookup":
            drafts = offered[: plan.rows - 1]
            drawn = [certain(draft) for draft in drafts]
            session.tokens += drafts
            if pinned is None or coefficients[0]:
                routed = session.read(None, range(start - 1, start + len(drafts)))
        else:
            routed, drafts, drawn = self._draft(sampler, plan.rows)
        routing = None if routed is None else routed.routing
        if pinned is not None:
            choices = [pinned] * plan.rows
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
                mine = [other for other in range(row, plan.rows) if choices[other] == choice]
                rows = session.read(choice, [start - 1 + other for other in mine]).logits
                answers |= {other: rows[at : at + 1] for at, other in enumerate(mine)}
            expert = answers[row]
            fused = session.fused(router if router is not None else expert, expert, coefficients, sampler, start + row)
            if row < len(drafts) and sampler.sampling.temperature:
                token = verify(distribution(sampler, fused), drawn[row], drafts[row], sampler.random)
            else:
                token = sampler.choose(candidates(fused), lambda fused=fused: fused.rows[0])  # type: ignore[misc]
            scores = (session.unrouted if routing is None else routing[row]).copy()
            found.append(Token(token, session.names[choice], session.logprob(token, fused, router, expert, coefficients), scores))
            if row < len(drafts) and token != drafts[row]:
                return found, row
        return found, len(drafts)

    def _draft(self, sampler: Sampler, rows: int) -> tuple[Output, list[int], list[Distribution]]:
        """Let the router go on alone for so many steps; each but the last gives a draft, chosen from its logits as tokens are from fused ones."""
        session = self._session
        drafts: list[int] = []
        drawn: list[Distribution] = []
        routing = np.empty((rows, len(session.names)), np.float32)
        for row in range(rows):
            answer = session.read(None, [len(session.tokens) - 1])
            own = self._rows[row : row + 1]
            own[...] = answer.logits
            assert answer.routing is not None
            routing[row] = answer.routing[0]
            if row == rows - 1:
                break
            if sampler.sampling.temperature:
                drawn.append(distribution(sampler, session.fused(own, own, (1.0, 0.0), sampler, len(session.tokens))))
                drafts.append(drawn[-1].draw(sampler.random.random()))
            elif sampler.sampling.repetition_penalty != 1.0:
                drafts.append(int(session.fused(own, own, (1.0, 0.0), sampler, len(session.tokens)).ids[0, 0]))
            else:
                drafts.append(int(own.argmax()))
            session.tokens.append(drafts[-1])
        return Output(self._rows[:rows], routing), drafts, drawn


def candidates(fused: Fused) -> Candidates:
    """Those of the only position."""
    return Candidates(fused.ids[0], fused.logits[0], float(fused.sampling_normaliser[0]))


def distribution(sampler: Sampler, fused: Fused) -> Distribution:
    """What sampling would draw from at the only position."""
    return Distribution(*sampler.distribution(candidates(fused), lambda: fused.rows[0]))
