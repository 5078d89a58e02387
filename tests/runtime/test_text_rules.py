"""Where a text may end: its rules alone, without a model."""

import re
from typing import Any

import pytest

from fusionroute.runtime import InputError
from fusionroute.runtime.text_rules import TextRules


@pytest.mark.parametrize(
    ("rules", "ends"),
    [
        ({}, {7}),
        ({"stop_token_ids": [0, 39]}, {0, 7, 39}),
        ({"stop_token_ids": (3,), "ignore_eos": True}, {3}),
        ({"ignore_eos": True}, set()),
    ],
)
def test_the_tokens_that_end_a_text(rules: dict[str, Any], ends: set[int]) -> None:
    assert TextRules(**rules).ends([7], 40) == ends


@pytest.mark.parametrize("wrong", [-1, 40, 41])
def test_the_first_id_outside_the_vocabulary_is_named(wrong: int) -> None:
    sentence = f"Token id {wrong} of stop_token_ids is outside the vocabulary: expected 0 to 39."
    with pytest.raises(InputError, match=f"^{re.escape(sentence)}$"):
        TextRules([0, wrong, 99]).ends([7], 40)
