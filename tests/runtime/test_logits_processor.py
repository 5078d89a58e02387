"""Processing of fused logits against Hugging Face's processors, and against definitions written out over the whole text."""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionroute.runtime import FusionRuntime, InputError
from fusionroute.runtime.backend import Fused
from fusionroute.runtime.logits_processor import LogitsProcessor, Penalties, Processed, largest
from fusionroute.runtime.occurrences import Occurrences
from fusionroute.runtime.sampling import Sampling, sampler_of
from tests.support.bundles import copy_with_ends
from tests.support.speculation import draft_always, prompts, same

VOCAB = 40
ANSWER = [7, 7, 9, 7, 12]
OPTIONS: dict[str, dict[str, Any]] = {
    "presence": {"presence_penalty": 0.7},
    "frequency": {"frequency_penalty": 0.3},
    "all penalties": {"presence_penalty": -0.5, "frequency_penalty": 0.2, "repetition_penalty": 1.3},
    "bias": {"logit_bias": {3: 4.0, 17: -3.5, 20: -math.inf}},
    "bias and penalties": {"logit_bias": {9: 2.0, 30: -1.0}, "presence_penalty": 1.0, "repetition_penalty": 0.8},
}


def fusion(row: Any) -> Fused:
    """What a fusion without a penalty returns."""
    rows = np.asarray(row, np.float32)[None]
    peak = rows.max()
    normaliser = (peak + np.log(np.exp(rows - peak).sum(-1))).astype(np.float32)
    best = rows.argmax(-1)[None]
    return Fused(best, rows[:, best[0]], rows[:, best[0]], normaliser, normaliser, rows)


def process(row: Any, ids: list[int], answer_start: int, sampling: Sampling, count: int = VOCAB, **ends: Any) -> Processed:
    processor = sampler_of(sampling, VOCAB, **ends).processor
    assert processor is not None
    processor.follow(ids, answer_start, len(ids), 0)
    return processor.process(fusion(row), count, sampling.temperature or 1.0)


def by_definition(row: Any, ids: list[int], answer_start: int, options: dict[str, Any]) -> np.ndarray:
    """The processed logits, float64 [V]."""
    logits = np.array(row, np.float64)
    for id, bias in (options.get("logit_bias") or {}).items():
        logits[id] += bias
    penalty = options.get("repetition_penalty", 1.0)
    for id in set(ids):
        logits[id] = logits[id] / penalty if logits[id] > 0 else logits[id] * penalty
    for id, count in Counter(ids[answer_start:]).items():
        logits[id] -= options.get("presence_penalty", 0.0) + count * options.get("frequency_penalty", 0.0)
    return logits


def test_bias_penalty_and_forbidden_ends_are_hugging_faces() -> None:
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers").generation.logits_process
    row = np.random.default_rng(0).normal(size=VOCAB).astype(np.float32) * 3
    prompt, bias, ends = [4, 5, 9], {3: 4.0, 9: -2.5, 30: 1.0}, [11, 30]
    for length, least in ((len(ANSWER), 6), (len(ANSWER), 5)):
        ids = prompt + ANSWER[:length]
        scores = torch.tensor(row)[None]
        for step in (
            processors.SequenceBiasLogitsProcessor({(id,): value for id, value in bias.items()}),
            processors.RepetitionPenaltyLogitsProcessor(1.7),
            processors.MinNewTokensLengthLogitsProcessor(len(prompt), least, ends),
        ):
            scores = step(torch.tensor([ids]), scores)
        processed = process(row, ids, len(prompt), Sampling(logit_bias=bias, repetition_penalty=1.7), ends=ends, min_new_tokens=least)
        np.testing.assert_array_equal(processed.rows[0], scores[0].numpy())


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_rows_candidates_and_normalisers(name: str, temperature: float) -> None:
    row = np.random.default_rng(1).normal(size=VOCAB).astype(np.float32) * 3
    ids = [1, 7, 30, *ANSWER]
    processed = process(row, ids, 3, Sampling(temperature=temperature, **OPTIONS[name]), 9)
    expected = by_definition(row, ids, 3, OPTIONS[name])
    order = np.lexsort((np.arange(VOCAB), -expected))[:9]
    scaled = expected / (temperature or 1.0)
    np.testing.assert_allclose(processed.rows[0], expected, rtol=1e-5)
    assert processed.ids[0].tolist() == order.tolist()
    np.testing.assert_allclose(processed.logits[0], expected[order], rtol=1e-5)
    np.testing.assert_array_equal(processed.raw, row)
    assert processed.sampling_normaliser[0] == pytest.approx(math.log(np.exp(scaled).sum()), rel=1e-5)
    assert processed.log_normaliser[0] == pytest.approx(math.log(np.exp(row.astype(np.float64)).sum()), rel=1e-5)


@settings(max_examples=200, deadline=None)
@given(values=st.lists(st.sampled_from([-math.inf, -2.0, -1.0, 0.5, 3.0]), min_size=1, max_size=30), count=st.integers(1, 30))
def test_the_largest_are_those_of_a_stable_sort(values: list[float], count: int) -> None:
    row, count = np.array(values, np.float32), min(count, len(values))
    finite = max(int(np.count_nonzero(row > -np.inf)), 1)
    assert largest(row, count).tolist() == np.lexsort((np.arange(len(row)), -row))[: min(count, finite)].tolist()


@settings(max_examples=80, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 12), st.lists(st.integers(0, 200), max_size=90), st.integers(0, 12)), max_size=12))
def test_counts_follow_a_text_that_is_cut_and_grows(changes: list[tuple[int, list[int], int]]) -> None:
    ids: list[int] = []
    start, occurrences, unchanged = 0, Occurrences(), 0
    for cut, more, behind in changes:
        del ids[max(len(ids) - cut, 0) :]
        unchanged = min(unchanged, len(ids))
        if len(ids) < start or cut == 11:
            start = len(ids)  # another answer begins
        ids += more
        stop = max(len(ids) - behind, start)
        occurrences.follow(ids, start, stop, unchanged)
        unchanged = len(ids)
        assert dict(zip(occurrences.ids.tolist(), occurrences.counts.tolist(), strict=True)) == Counter(ids[start:stop])


def test_where_nothing_may_be_chosen_it_is_said() -> None:
    with pytest.raises(InputError, match=r"^No token is left to choose: logit_bias or min_new_tokens bars all that may stand here\.$"):
        process(np.zeros(VOCAB), [1], 1, Sampling(logit_bias=dict.fromkeys(range(VOCAB), -math.inf)))
    with pytest.raises(InputError, match=r"^Token id 40 of logit_bias is outside the vocabulary: expected 0 to 39\.$"):
        LogitsProcessor(VOCAB, {40: 1.0}, Penalties())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a bias that is no dict": ({"logit_bias": [1]}, "logit_bias is [1], expected a dict of token ids and numbers."),
    "a bias for a text": ({"logit_bias": {"5": 1.0}}, "A token id of logit_bias is '5', expected a whole number."),
    "an infinite bias": ({"logit_bias": {5: math.inf}}, "A value of logit_bias is inf, expected a finite number, or -inf to bar the token."),
    "presence": ({"presence_penalty": math.inf}, "presence_penalty is inf, expected a finite number; 0 turns it off."),
    "frequency": ({"frequency_penalty": "1"}, "frequency_penalty is '1', expected a number."),
    "alternatives": ({"top_logprobs": 21}, "top_logprobs is 21, expected 0 (off) to 20."),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_values_are_one_sentence(name: str) -> None:
    options, sentence = REFUSED[name]
    with pytest.raises(InputError) as caught:
        Sampling(**options)
    assert str(caught.value) == sentence


@pytest.fixture(scope="module")
def rt(bundles: list[Path]) -> Iterator[FusionRuntime]:
    with FusionRuntime.load(bundles[0], precision="fp32") as runtime:
        yield runtime


@pytest.mark.parametrize("name", OPTIONS)
def test_greedy_tokens_are_those_of_teacher_forced_logits(name: str, rt: FusionRuntime) -> None:
    """Each token is the argmax of the definition, over logits that another pass computed."""
    for ids in prompts(3, rt.vocab_size, seed=3):
        result = rt.generate(ids, 16, top_logprobs=3, ignore_eos=True, **OPTIONS[name])
        scores = rt.score(ids + result.token_ids, positions=range(len(ids) - 1, len(ids) + len(result.token_ids) - 1))
        for place, (row, token) in enumerate(zip(scores.logits, result.token_ids, strict=True)):
            expected = by_definition(row, ids + result.token_ids[:place], len(ids), OPTIONS[name])
            assert expected[token] == pytest.approx(expected.max(), abs=1e-4)
            logprobs = row.astype(np.float64) - math.log(np.exp(row.astype(np.float64)).sum())
            assert result.logprobs[place] == pytest.approx(logprobs[token], abs=1e-4)
            likeliest, values = zip(*result.top_logprobs[place], strict=True)
            assert values == pytest.approx(np.sort(logprobs)[::-1][:3], abs=1e-4)
            assert values == pytest.approx(logprobs[list(likeliest)], abs=1e-4)


@pytest.mark.parametrize("name", ["all penalties", "bias and penalties"])
def test_drafts_change_no_greedy_token(name: str, bundles: list[Path], eager: None) -> None:
    assert same(bundles[0], "fp32", 3, False, top_logprobs=2, **OPTIONS[name]) > 0


def test_sessions_count_what_steps_chose(rt: FusionRuntime) -> None:
    """A session that is rewound, and one whose answer began anew, choose as one that has only this text."""
    options: dict[str, Any] = {"presence_penalty": 3.0, "frequency_penalty": 2.0}
    session, fresh = rt.session(), rt.session()
    session.append([5, 6, 7])
    first = [session.step(**options).id for _ in range(8)]
    session.rewind(5)
    assert [session.step(**options).id for _ in range(6)] == first[2:]
    session.append([9])
    fresh.append(session.token_ids)
    assert [session.step(**options).id for _ in range(5)] == [fresh.step(**options).id for _ in range(5)]
    logits = session.logits
    before = logits.copy()
    session.step(**options)
    np.testing.assert_array_equal(logits, before)


def test_ends(rt: FusionRuntime, bundles: list[Path], tmp_path: Path) -> None:
    """Stop ids, and ends that are ignored or barred, against the text that nothing ends."""
    ids = [5, 6, 7]
    long = rt.generate(ids, 12, ignore_eos=True)
    stop = long.token_ids[4]
    stopped = rt.generate(ids, 12, ignore_eos=True, stop_token_ids=[stop])
    first = long.token_ids.index(stop)
    assert (stopped.token_ids, stopped.finish_reason) == (long.token_ids[:first], "stop")
    least = rt.generate(ids, 12, ignore_eos=True, stop_token_ids=[stop], min_new_tokens=9)
    assert len(least.token_ids) >= 9 and stop not in least.token_ids[:9]
    assert least.token_ids[:first] == long.token_ids[:first]
    banned = rt.generate(ids, 12, ignore_eos=True, logit_bias={stop: -math.inf})
    assert stop not in banned.token_ids
    with FusionRuntime.load(copy_with_ends(bundles[0], tmp_path / "bundle", [stop]), precision="fp32") as ending:
        assert ending.generate(ids, 12).token_ids == long.token_ids[:first]
        assert ending.generate(ids, 12, ignore_eos=True).token_ids == long.token_ids
        assert ending.generate(ids, 12, min_new_tokens=9).token_ids == least.token_ids
    with pytest.raises(InputError, match=r"^Token id -1 of stop_token_ids is outside the vocabulary: expected 0 to \d+\.$"):
        rt.generate(ids, 2, stop_token_ids=[-1])


def test_alternatives_do_not_change_the_text(rt: FusionRuntime) -> None:
    cases: list[dict[str, Any]] = [{}, {"temperature": 0.9, "seed": 4}, {"repetition_penalty": 1.4}]
    for options in cases:
        plain, told = rt.generate([5, 6, 7], 12, **options), rt.generate([5, 6, 7], 12, top_logprobs=20, **options)
        assert plain.token_ids == told.token_ids and plain.top_logprobs[0] == ()
        assert [len(each) for each in told.top_logprobs] == [20] * len(told.token_ids)
        assert told.logprobs == pytest.approx(plain.logprobs, abs=1e-5)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft as often as the text allows."""
    draft_always(monkeypatch)
