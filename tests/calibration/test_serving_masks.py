"""What each model serves, against the session's rule played through step by step."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusionroute.calibration.record import NOBODY, RecordedText
from fusionroute.calibration.serving_masks import serving_masks, shares

N = 3


@st.composite
def recorded(draw: st.DrawFn) -> RecordedText:
    prompt, answers = draw(st.integers(1, 6)), draw(st.lists(st.integers(0, N - 1), min_size=1, max_size=8))
    ids = np.arange(prompt + len(answers), dtype=np.int32)
    return RecordedText(ids, np.array([NOBODY] * (prompt - 1) + answers + [NOBODY], np.int8))


def played(text: RecordedText, model: int) -> tuple[set[int], list[int]]:
    """The positions that an expert reads, and those where it answers.

    Before it answers it reads everything that it has missed.
    """
    read: set[int] = set()
    answered = []
    for position, expert in enumerate(text.experts):
        if expert == model:
            read |= set(range(position + 1))
            answered.append(position)
    return read, answered


@given(st.lists(recorded(), max_size=4), st.integers(0, N - 1))
def test_an_expert_serves_what_it_reads_in_a_session(texts: list[RecordedText], model: int) -> None:
    for text, mask in zip(texts, serving_masks(texts, model), strict=True):
        read, answered = played(text, model)
        assert set(range(mask.body)) == read
        assert mask.head.tolist() == answered and mask.head.dtype == np.int64


@given(st.lists(recorded(), max_size=4))
def test_the_router_reads_all_and_answers_wherever_somebody_does(texts: list[RecordedText]) -> None:
    for text, mask in zip(texts, serving_masks(texts, None), strict=True):
        assert mask.body == len(text.ids)
        assert mask.head.tolist() == sorted(position for model in range(N) for position in played(text, model)[1])


@given(st.lists(recorded(), max_size=4))
def test_shares(texts: list[RecordedText]) -> None:
    answers = [int(expert) for text in texts for expert in text.experts if expert != NOBODY]
    assert shares(texts, N) == pytest.approx([answers.count(expert) / max(len(answers), 1) for expert in range(N)])


def test_an_expert_that_is_never_chosen_serves_nothing() -> None:
    (mask,) = serving_masks([RecordedText(np.arange(4, dtype=np.int32), np.array([NOBODY, 0, 0, NOBODY], np.int8))], 1)
    assert mask.body == 0 and len(mask.head) == 0
