"""What may be done with a session, at random."""

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from fusionroute.runtime import Session

TOLERANCE = 2e-5  # of the largest |logit|, between sessions that should agree
STEPS = st.fixed_dictionaries({}, optional={
    "lam": st.sampled_from([0.0, 0.3, 1.0]), "fusion": st.sampled_from(["weighted", "additive"]), "repetition_penalty": st.just(1.4),
})  # fmt: skip
ACTIONS = st.one_of(
    st.tuples(st.just("step"), st.integers(1, 6), STEPS),
    st.tuples(st.just("append"), st.lists(st.integers(3, 299), min_size=1, max_size=40)),
    st.tuples(st.just("rewind"), st.floats(0, 1)),
    st.tuples(st.just("pin"), st.sampled_from([None, None, 0, 1, 2])),
    st.tuples(st.just("guess"), st.sampled_from([None, 0, 1, 2])),
)


def act(session: Session, action: str, arguments: Sequence[Any]) -> None:
    """All but steps, whose tokens the caller compares."""
    if action == "append":
        session.append(arguments[0])
    elif action == "rewind":
        session.rewind(max(1, round(arguments[0] * len(session))))
    elif action == "pin":
        session._pinned = arguments[0]
    elif action == "guess":  # a wrong one, mostly
        session._decoder.step.guesses.saw(session.token_ids[-1], arguments[0])
