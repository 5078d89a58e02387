"""Fused logits: how λ mixes them, which positions are scored, and log-probabilities of tokens."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionroute.runtime import FusionRuntime, InputError
from fusionroute.runtime.backends.ort_cpu import OrtCache

PROMPT = "12+30= and more"


@pytest.fixture
def tokens_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each pass reads."""
    counts: list[int] = []
    forward = OrtCache.forward

    def noted(cache: OrtCache, ids: Any, positions: Any) -> Any:
        counts.append(len(ids))
        return forward(cache, ids, positions)

    monkeypatch.setattr(OrtCache, "forward", noted)
    return counts


def test_lambda_and_mode(bundles: list[Path]) -> None:
    with FusionRuntime.load(bundles[0], precision="fp32") as rt:
        ids = rt.encode(PROMPT)
        router, expert, between = (rt.score(ids, lam=lam).logits for lam in (1.0, 0.0, 0.3))
        assert np.allclose(between, 0.3 * router + 0.7 * expert, atol=1e-4)
        assert not np.allclose(router, expert, atol=0.1)
        additive = rt.score(ids, fusion="additive").logits
        assert np.allclose(additive, router + expert, atol=1e-4)
        greedy = rt.generate(ids, 16, fusion="additive")
        assert greedy.token_ids == rt.generate(ids, 16, fusion="weighted", lam=0.5).token_ids


def test_scores_limited_to_positions(rt: FusionRuntime) -> None:
    ids = rt.encode(PROMPT)
    full = rt.score(ids)
    assert full.logits.shape == (len(ids), rt.vocab_size)
    asked = [5, 2, 5, len(ids) - 1]
    some = rt.score(ids, positions=asked)
    assert np.allclose(some.logits, full.logits[asked], atol=1e-4 if rt.precision == "fp32" else 0.3)
    assert (some.experts == full.experts[asked]).all()
    assert some.routing.shape == (4, len(rt.expert_names))
    assert rt.score(ids, positions=[]).logits.shape == (0, rt.vocab_size)


def test_scores_do_not_depend_on_how_many_rows_are_fused_at_once(bundles: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with FusionRuntime.load(bundles[0], precision="fp32") as rt:
        ids = rt.encode(PROMPT)
        whole = rt.score(ids).logits
        monkeypatch.setattr("fusionroute.runtime.limits.FUSED", 2 * rt.vocab_size)
        assert (rt.score(ids).logits == whole).all()


def test_logprob_is_of_the_fused_distribution_at_temperature_1(bundles: list[Path]) -> None:
    with FusionRuntime.load(bundles[0], precision="fp32") as rt:
        ids = rt.encode(PROMPT)
        tokens = list(rt.stream(ids, 12, temperature=1.3, repetition_penalty=1.2, seed=0))
        rows = rt.score([*ids, *(t.id for t in tokens)]).logits.astype(np.float64)
        for place, token in enumerate(tokens):
            row = rows[len(ids) - 1 + place]
            expected = row[token.id] - row.max() - np.log(np.exp(row - row.max()).sum())
            assert token.logprob == pytest.approx(expected, abs=1e-3)


@pytest.fixture(params=range(3), scope="module")
def each(request: pytest.FixtureRequest, bundles: list[Path]) -> Iterator[FusionRuntime]:
    with FusionRuntime.load(bundles[request.param], precision="fp32") as runtime:
        yield runtime


@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_a_session_judges_endings_of_one_text(each: FusionRuntime, data: st.DataObject) -> None:
    tokens = st.integers(3, each.vocab_size - 1)
    context = data.draw(st.lists(tokens, min_size=1, max_size=9), "context")
    lam = data.draw(st.sampled_from([0.0, 0.3, 1.0]), "lam")
    session = each.session(lam=lam)
    session.append(context)
    for ending in data.draw(st.lists(st.lists(tokens, max_size=9), max_size=3), "endings"):
        scores, ids = session.score(ending), [*context, *ending]
        expected = each.score(ids, range(len(context) - 1, len(ids) - 1), lam=lam)
        assert np.allclose(scores.logits, expected.logits, atol=1e-4)
        assert (scores.experts == expected.experts).all() and np.allclose(scores.routing, expected.routing, atol=1e-4)
        assert session.token_ids == ids
        session.rewind(len(context))


def test_a_long_ending_is_judged_in_pieces(bundles: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with FusionRuntime.load(bundles[0], precision="fp32") as rt:
        ids = [3 + number * 7 % 200 for number in range(40)]
        expected = rt.score(ids).logits
        monkeypatch.setattr("fusionroute.runtime.limits.CHUNK", 6)
        session = rt.session()
        session.append(ids[:1])
        assert np.allclose(session.score(ids[1:]).logits, expected[:-1], atol=1e-4)


def test_only_models_with_a_say_judge(bundles: list[Path], tokens_read: list[int]) -> None:
    with FusionRuntime.load(bundles[0], precision="fp32") as rt:
        ids = rt.encode(PROMPT)
        for expert, lam in [("expert1", 0.0), (None, 1.0)]:
            session = rt.session(expert=expert, lam=lam)
            session.append(ids[:4])
            tokens_read.clear()
            scores = session.score(ids[4:])
            assert tokens_read == [len(ids) - 1]  # one pass, of one model
            assert bool(np.isnan(scores.routing).all()) == (lam == 0)
            session.rewind(4)
            tokens_read.clear()
            session.score(ids[4:6])
            assert tokens_read == [2]  # the text before is not read again


def test_a_session_that_cannot_judge_stays_as_it_was(bundles: list[Path]) -> None:
    with FusionRuntime.load(bundles[0], precision="fp32") as rt:
        session = rt.session()
        with pytest.raises(InputError, match=r"^The session holds no tokens: append a prompt of at least one token first\.$"):
            session.score([5])
        session.append([5, 6])
        with pytest.raises(InputError, match=r"outside the vocabulary"):
            session.score([7, rt.vocab_size])
        assert session.token_ids == [5, 6]
