"""Fused logits: how λ mixes them, which positions are scored, and log-probabilities of tokens."""

from pathlib import Path

import numpy as np
import pytest

from fusionroute.runtime import FusionRuntime

PROMPT = "12+30= and more"


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
