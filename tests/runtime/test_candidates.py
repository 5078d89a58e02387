"""The likeliest tokens of router, expert and fusion that come with a token, against whole rows of logits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusionroute.runtime import FusionRuntime, InputError
from tests.support.speculation import draft_always

PROMPT = "12+30= and more"
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "seed": 3},
    "penalties": {"repetition_penalty": 1.4, "presence_penalty": 1.0, "logit_bias": {17: 3.0}},
    "router alone": {"lam": 1.0},
    "routed expert alone": {"lam": 0.0},
    "one expert alone": {"lam": 0.0, "expert": "expert1"},
}


def ranking(row: np.ndarray, count: int) -> list[tuple[int, float]]:
    """The likeliest ids of logits [V] with log-probabilities, sorted by hand."""
    values = row.astype(np.float64) - np.log(np.exp(row.astype(np.float64)).sum())
    return [(int(id), float(values[id])) for id in np.argsort(-row, kind="stable")[:count]]


@pytest.mark.parametrize("speculation", ["off", "auto"])
@pytest.mark.parametrize("number", range(3))
def test_candidates_are_the_likeliest_of_each_model(
    bundles: list[Path], number: int, speculation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft_always(monkeypatch)
    with FusionRuntime.load(bundles[number], "fp32", "cpu", speculation=speculation) as rt:
        ids = rt.encode(PROMPT)
        for options in OPTIONS.values():
            tokens = list(rt.stream(ids, 12, candidates=3, **options))
            read = [*ids, *(token.id for token in tokens)]
            router, expert, fused = (rt.score(read, lam=lam).logits[len(ids) - 1 :] for lam in (1.0, 0.0, options.get("lam", 0.5)))
            if options.get("expert"):
                pinned = rt.session(lam=0.0, expert=options["expert"])
                pinned.append(ids)
                expert = fused = pinned.score(read[len(ids) :]).logits
            for place, token in enumerate(tokens):
                assert token.candidates is not None
                ran = {"router": "expert" not in options, "expert": options.get("lam") != 1, "fused": True}
                for model, rows in {"router": router, "expert": expert, "fused": fused}.items():
                    likeliest, expected = getattr(token.candidates, model), ranking(rows[place], 3) if ran[model] else []
                    assert [id for id, _ in likeliest] == [id for id, _ in expected]
                    assert [value for _, value in likeliest] == pytest.approx([value for _, value in expected], abs=1e-3)


def test_candidates_change_no_text_and_cost_nothing_unasked(bundles: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with FusionRuntime.load(bundles[0], "int8", "cpu") as rt:
        asked = list(rt.stream(PROMPT, 12, candidates=5, temperature=0.8, seed=1))
        monkeypatch.setattr("fusionroute.runtime.plain_step.ranked", None)  # nobody ranks a row
        monkeypatch.setattr("fusionroute.runtime.plain_step.top_logprobs", None)
        plain = list(rt.stream(PROMPT, 12, temperature=0.8, seed=1))
        assert [token.id for token in plain] == [token.id for token in asked]
        assert {token.candidates for token in plain} == {None}


def test_a_number_of_candidates_has_bounds(bundles: list[Path]) -> None:
    with FusionRuntime.load(bundles[0], "int8", "cpu") as rt:
        with pytest.raises(InputError, match=r"^candidates is 21, expected 0 \(off\) to 20\.$"):
            rt.generate(PROMPT, 2, candidates=21)
        session = rt.session()
        session.append(rt.encode(PROMPT))
        token = session.step(candidates=2)
        assert token.candidates is not None and len(token.candidates.router) == 2
