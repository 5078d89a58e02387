"""The measured unit: one text, from its prompt to its last token."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from fusionroute.runtime.session import Session

Clock = Callable[[], float]  # seconds
Models = Callable[[], float | None]  # seconds that runs of models have taken so far; None: not known
NO_MODELS: Models = lambda: None  # noqa: E731


@dataclass(frozen=True)
class Run:
    """One text. `first`: seconds from the prompt to the first token; `seconds` of each later one; `experts`: of every
    token, the first included.

    own: what each later token took beyond the runs of its models; None where they run on a device, and with drafts.

    Tokens of one round of speculation come together: the first of them took its time, the others none. `drafted`,
    `accepted`: see `Result`.
    """

    first: float
    seconds: list[float]
    experts: list[str]
    own: list[float] | None = None
    drafted: int = 0
    accepted: int = 0


def generate(
    session: Session, prompt: Sequence[int], count: int, drafts: bool = False, clock: Clock = time.perf_counter, models: Models = NO_MODELS
) -> Run:
    """Choose `count` tokens greedily after a prompt, also beyond the text's end; `drafts`: with speculation."""
    session.clear()
    times, busy, experts = [clock()], [models()], list[str]()
    session.append(prompt)
    while len(experts) < count:
        experts += [token.expert for token in session.steps(count - len(experts))] if drafts else [session.step().expert]
        times += [clock()] * (len(experts) + 1 - len(times))
        busy.append(models())
    first, *seconds = (after - before for before, after in pairwise(times))
    in_models = [after - before for before, after in pairwise(each for each in busy if each is not None)][1:]
    own = None if drafts or not in_models else [whole - part for whole, part in zip(seconds, in_models, strict=True)]
    return Run(first, seconds, experts, own, session.drafted, session.accepted)
