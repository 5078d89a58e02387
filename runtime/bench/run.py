"""The measured unit: one text, from its prompt to its last token."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from runtime.session import Session

Clock = Callable[[], float]  # seconds


@dataclass(frozen=True)
class Run:
    """One text. `first`: seconds from the prompt to the first token; `seconds` of each later one; `experts`: of every token, the first included."""

    first: float
    seconds: list[float]
    experts: list[str]


def generate(session: Session, prompt: Sequence[int], count: int, clock: Clock = time.perf_counter) -> Run:
    """Choose `count` tokens greedily after a prompt, whether or not the text would end before."""
    session.clear()
    times, experts = [clock()], []
    session.append(prompt)
    for _ in range(count):
        experts.append(session.step().expert)
        times.append(clock())
    first, *seconds = (after - before for before, after in pairwise(times))
    return Run(first, seconds, experts)
