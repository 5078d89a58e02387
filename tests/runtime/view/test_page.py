"""Pages of answers: nothing in them is run or loaded."""

import re

import numpy as np

from fusionroute.runtime import Token
from fusionroute.runtime.text import Likeliest
from fusionroute.runtime.view.details import details
from fusionroute.runtime.view.page import answer_page, asset
from tests.support.pages import answer_in

HOSTILE = "</script><img src=x onerror=alert(1)>&'\"\u2028"


def test_what_others_wrote_is_data_and_no_markup() -> None:
    told = {"id": 1, "text": HOSTILE, "expert": HOSTILE, "routing": [0.0], "candidates": {"router": [], "expert": [], "fused": []}}
    answer = {"model": HOSTILE, "facts": {HOSTILE: HOSTILE}, "experts": [HOSTILE], "router": HOSTILE, "prompt": HOSTILE, "tokens": [told]}
    page = answer_page(answer)
    assert answer_in(page) == answer
    assert "<img" not in page and page.count("</script") == answer_page(None).count("</script")
    assert "innerHTML" not in asset("answer.js") + asset("playground.js")


def test_a_page_loads_nothing() -> None:
    page = answer_page(None)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"// .*", "", page))
    assert "default-src 'none'" in page and answer_in(page) is None


def test_numbers_that_json_lacks_are_null() -> None:
    token = Token(7, "math", -1.0, np.array([np.nan, 1.5], np.float32), "a", candidates=Likeliest((), ((7, -np.inf),), ((7, -0.5),)))
    assert details(token, None) == {
        "id": 7, "text": "a", "expert": "math", "routing": [None, 1.5],
        "candidates": {"router": [], "expert": [{"id": 7, "text": "7", "logprob": None}], "fused": [{"id": 7, "text": "7", "logprob": -0.5}]},
    }  # fmt: skip
