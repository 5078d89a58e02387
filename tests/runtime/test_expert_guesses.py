"""Guesses of experts: who answered behind the same token, else who answered last."""

from hypothesis import given
from hypothesis import strategies as st

from fusionroute.runtime.expert_guesses import ExpertGuesses


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=40), st.integers(0, 5))
def test_the_last_answer_behind_a_token_counts_most(answers: list[tuple[int, int]], token: int) -> None:
    guesses = ExpertGuesses()
    for answer in answers:
        guesses.saw(*answer)
    behind = [expert for other, expert in answers if other == token]
    expected = list(dict.fromkeys([*behind[-1:], *(expert for _, expert in answers[-1:])]))
    assert guesses.likely(token) == expected


def test_nobody_is_guessed_for_the_first_token_of_another_text() -> None:
    guesses = ExpertGuesses()
    guesses.saw(4, 1)
    guesses.last = None
    assert guesses.likely(4) == []
    guesses.saw(5, 0)
    assert guesses.likely(4) == [1, 0], "what was learned stays"
