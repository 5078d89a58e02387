"""Decoding methods: each gives what the runtime, or a plain recomputation of the whole text at every step, gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusionroute.fr_export.evaluation.methods import MethodDecoder, check, method_named
from fusionroute.runtime import FusionRuntime, InputError
from fusionroute.runtime.backends.ort_cpu import OrtCache

PROMPTS = ("12+30=", "a", "sorted([3, 1, 2])", "Uppercase: sun cat")
LIMIT = 12
ALONE = {f"expert:expert{number}": {"expert": f"expert{number}", "lam": 0.0} for number in range(3)}
OPTIONS: dict[str, dict[str, Any]] = {"fused": {}, "router": {"lam": 1.0}, "token": {"lam": 0.0}, "lambda:0.3": {"lam": 0.3}, **ALONE}


@pytest.fixture(params=["fp32", "int8"])
def rt(request: pytest.FixtureRequest, random_bundle: Path) -> Iterator[FusionRuntime]:
    with FusionRuntime.load(random_bundle, request.param, threads=1) as runtime:
        yield runtime


@pytest.fixture
def exact(random_bundle: Path) -> Iterator[FusionRuntime]:
    with FusionRuntime.load(random_bundle, "fp32", threads=1) as runtime:
        yield runtime


def answers(rt: FusionRuntime, names: list[str], prompt: str, guess: tuple[int, ...] = ()) -> dict[str, Any]:
    decoder = MethodDecoder(rt)
    decoder.start(rt.encode(prompt), guess)
    return {name: decoder.answer(method_named(name, rt.expert_names, rt.fusion, rt.lam), LIMIT) for name in names}


@pytest.mark.parametrize("names", [list(OPTIONS), list(OPTIONS)[::-1]], ids=["forth", "back"])
def test_methods_give_what_the_runtime_generates(rt: FusionRuntime, names: list[str]) -> None:
    """In any order, since what one method has read must not change what the next one reads."""
    differing = set()
    for prompt in PROMPTS:
        for name, answer in answers(rt, names, prompt).items():
            expected = rt.generate(prompt, LIMIT, **OPTIONS[name])
            assert answer.token_ids == expected.token_ids, (prompt, name)
            assert [rt.expert_names[expert] for expert in answer.experts[: len(answer.token_ids)]] == expected.experts
            assert answer.text == expected.text
            assert (len(answer.experts) > len(answer.token_ids)) == (expected.finish_reason == "stop")
            if expected.finish_reason == "length":  # else the end's own log-probability counts too
                assert answer.logprob == pytest.approx(np.mean(expected.logprobs), abs=1e-4)
            differing.add(tuple(answer.token_ids))
    assert len(differing) > 3 * len(PROMPTS), "the test would say nothing if all methods agreed"


def test_a_guess_changes_no_answer(exact: FusionRuntime) -> None:
    for prompt in PROMPTS:
        plain = answers(exact, list(OPTIONS), prompt)
        right = tuple(plain["fused"].token_ids)
        for guess in (right, right[:5], (*right[:4], 7, 8, 9), (7,)):
            shared = answers(exact, list(OPTIONS), prompt, guess)
            assert [(a.token_ids, a.experts) for a in shared.values()] == [(a.token_ids, a.experts) for a in plain.values()]
            assert np.allclose([a.logprob for a in shared.values()], [a.logprob for a in plain.values()], atol=1e-5)


def test_a_right_guess_costs_one_pass_per_model(exact: FusionRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = answers(exact, ["fused"], PROMPTS[0])["fused"]
    passes = 0
    forward = OrtCache.forward

    def counted(*arguments: Any) -> Any:
        nonlocal passes
        passes += 1
        return forward(*arguments)

    monkeypatch.setattr(OrtCache, "forward", counted)
    answers(exact, ["fused"], PROMPTS[0], tuple(plain.token_ids))
    assert passes == 1 + len(set(plain.experts))


def test_dropped_rows_are_computed_again(rt: FusionRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["fused", "token", "expert:expert1", "fused", "expert:expert1"]
    expected = answers(rt, names, PROMPTS[2])
    decoder = MethodDecoder(rt)
    for reader in decoder._readers:
        reader._room = 2
    decoder.start(rt.encode(PROMPTS[2]))
    for name in names:
        assert decoder.answer(method_named(name, rt.expert_names, rt.fusion, rt.lam), LIMIT) == expected[name]


def anew(model: Any, ids: list[int]) -> np.ndarray:
    """Log-probabilities of the next token, float64 [V], the whole text read in one pass."""
    row = model.cache().forward(ids, (len(ids) - 1,)).logits[0].astype(np.float64)
    return np.asarray(row - row.max() - np.log(np.exp(row - row.max()).sum()))


def test_collab_is_the_most_certain_expert(exact: FusionRuntime) -> None:
    chosen = set()
    for prompt in PROMPTS:
        answer = answers(exact, ["collab"], prompt)["collab"]
        ids, peaks = exact.encode(prompt), []
        for token, expert in zip(answer.token_ids, answer.experts, strict=True):
            rows = [anew(model, ids) for model in exact.backend.experts]
            best = max(range(3), key=lambda number: rows[number].max())
            assert (token, expert) == (int(rows[best].argmax()), best)
            peaks.append(rows[best].max())
            ids.append(token)
            chosen.add(best)
        assert answer.logprob == pytest.approx(np.mean(peaks), abs=1e-4)
    assert len(chosen) > 1


def test_token_selection_follows_the_routing_and_the_expert_alone(exact: FusionRuntime) -> None:
    for prompt in PROMPTS[:2]:
        answer = answers(exact, ["token"], prompt)["token"]
        ids = exact.encode(prompt)
        for token, expert in zip(answer.token_ids, answer.experts, strict=True):
            routing = exact.backend.router.cache().forward(ids, (len(ids) - 1,)).routing
            assert routing is not None and expert == int(routing[0].argmax())
            assert token == int(anew(exact.backend.experts[expert], ids).argmax())
            ids.append(token)


def test_the_end_of_sequence_ends_and_counts_as_a_decision(exact: FusionRuntime) -> None:
    long = answers(exact, ["fused"], PROMPTS[0])["fused"]
    end = long.token_ids[5]
    decoder = MethodDecoder(exact)
    decoder._ends = frozenset({end})
    decoder.start(exact.encode(PROMPTS[0]))
    answer = decoder.answer(method_named("fused", exact.expert_names, exact.fusion, exact.lam), LIMIT)
    assert answer.token_ids == long.token_ids[: long.token_ids.index(end)]
    assert answer.experts == long.experts[: len(answer.token_ids) + 1]


def test_additive_fusion(exact: FusionRuntime) -> None:
    decoder = MethodDecoder(exact)
    decoder.start(exact.encode(PROMPTS[0]))
    answer = decoder.answer(method_named("fused", exact.expert_names, "additive", 0.5), LIMIT)
    expected = exact.generate(PROMPTS[0], LIMIT, fusion="additive")
    assert answer.token_ids == expected.token_ids
    assert answer.logprob == pytest.approx(np.mean(expected.logprobs), abs=1e-4)


def test_the_context_bounds_prompts_and_answers(exact: FusionRuntime) -> None:
    decoder, method = MethodDecoder(exact), method_named("fused", exact.expert_names, exact.fusion, exact.lam)
    decoder.start([5] * (exact.max_seq_len - 3), (7,) * 50)
    assert len(decoder.answer(method, LIMIT).token_ids) <= 3
    for length in (0, exact.max_seq_len):
        with pytest.raises(InputError, match=rf"The prompt has {length} tokens: .* context of {exact.max_seq_len}"):
            decoder.start([5] * length)


def test_names(exact: FusionRuntime) -> None:
    for name in (*OPTIONS, "collab", "sequence", "sequence-routed"):
        check(name, exact.expert_names)
    for name in ("fusion", "expert:history", "expert", "", "token:1"):
        with pytest.raises(InputError, match=f"Unknown method '{name}': expected some of fused, router, token, expert:expert0"):
            check(name, exact.expert_names)
    for name in ("lambda:2", "lambda:x", "lambda:", "lambda:nan"):
        with pytest.raises(InputError, match=f"'{name}' is no method: expected lambda:X"):
            check(name, exact.expert_names)
