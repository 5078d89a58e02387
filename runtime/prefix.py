"""The prefix cache: prompts that begin alike are read once. What one session has read of its prompt, others of the runtime take over.

Only tokens that were read several at a time count, an even number of them: such passes agree bit for bit however a text is cut, where the
last of an odd number, or a single token, may not. So text does not depend on what happens to be kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile
from operator import eq
from typing import TYPE_CHECKING

from fusionroute.runtime.backend import Cache

if TYPE_CHECKING:
    from fusionroute.runtime.session import Session

LEAST = 16  # tokens that are worth a copy


def common(one: Sequence[int], other: Sequence[int], most: int) -> int:
    """How many leading tokens two texts have in common, at most `most`."""
    return sum(takewhile(bool, map(eq, one[: max(most, 0)], other)))


def fill(session: Session, model: int | None, cache: Cache, others: Iterable[Session]) -> None:
    """Copy into the empty cache of a model (None: the router) what other sessions have read of the session's tokens."""
    offers = ((other.offer(model, session.tokens), other) for other in others if other is not session)
    length, best = max(offers, key=lambda offer: offer[0], default=(0, None))
    if best is not None and length >= LEAST:
        best.lend(model, session.tokens, cache)
