"""The measured unit: one text, from its prompt to its last token."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from fusionroute.runtime.session import Session

Clock = Callable[[], float]  # seconds


@dataclass(frozen=True)
class Run:
    """One text. `first`: seconds from the prompt to the first token; `seconds` of each later one; `experts`: of every
    token, the first included.

    Tokens of one round of speculation come together: the first of them took its time, the others none. `drafted`,
    `accepted`: see `Result`.
    """

    first: float
    seconds: list[float]
    experts: list[str]
    drafted: int = 0
    accepted: int = 0


def generate(session: Session, prompt: Sequence[int], count: int, drafts: bool = False, clock: Clock = time.perf_counter) -> Run:
    """Choose `count` tokens greedily after a prompt, also beyond the text's end; `drafts`: with speculation."""
    session.clear()
    times, experts = [clock()], list[str]()
    session.append(prompt)
    while len(experts) < count:
        experts += [token.expert for token in session.steps(count - len(experts))] if drafts else [session.step().expert]
        times += [clock()] * (len(experts) + 1 - len(times))
    first, *seconds = (after - before for before, after in pairwise(times))
    return Run(first, seconds, experts, session.drafted, session.accepted)
