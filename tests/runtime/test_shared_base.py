"""A system with one base gives the tokens, experts and logits of the same system as merged models, whatever is done."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.backends.hidden_rows import BoundHead, Head
from fusionroute.runtime.backends.ort_pair import OrtPair
from fusionroute.runtime.backends.pair_binding import PairBinding
from fusionroute.runtime.cancellation import Interrupted
from fusionroute.runtime.plain_step import PlainStep
from tests.support.session_actions import ACTIONS, TOLERANCE, act
from tests.support.speculation import draft_always, prompts, same

Loaded = tuple[FusionRuntime, FusionRuntime]


@pytest.fixture(scope="module")
def loaded(shared: Path, merged: Path) -> Iterator[Loaded]:
    """The system in fp32 with one base, and as merged models."""
    with FusionRuntime.load(shared, "fp32", "cpu") as pair, FusionRuntime.load(merged, "fp32", "cpu") as full:
        assert isinstance(pair.backend, OrtPair) and not isinstance(full.backend, OrtPair)
        yield pair, full


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Tokens of router and expert in every pass from now on, dummies left out (0: a model that does not read)."""
    counts: list[tuple[int, int]] = []
    run = PairBinding.run

    def noted(binding: PairBinding, segments: Any, lengths: Any) -> Any:
        own, other = (len(segment.ids) if segment.positions else 0 for segment in segments)
        counts.append((own, other))
        return run(binding, segments, lengths)

    monkeypatch.setattr(PairBinding, "run", noted)
    return counts


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(3, 299), min_size=1, max_size=30), st.lists(ACTIONS, min_size=1, max_size=10))
def test_sessions_agree_whatever_is_done_with_them(loaded: Loaded, prompt: list[int], actions: list[Any]) -> None:
    sessions = [rt.session() for rt in loaded]
    for session in sessions:
        session.append(prompt)
    for action, *arguments in [*actions, ("step", 1, {})]:
        for session in sessions:
            act(session, action, arguments)
        if action == "step":
            for _ in range(arguments[0]):
                ours, theirs = (session.step(**arguments[1]) for session in sessions)
                logits, expected = (session.logits for session in sessions)
                assert np.abs(logits - expected).max() <= TOLERANCE * np.abs(expected).max() * 2  # two fused models
                assert (ours.id, ours.expert) == (theirs.id, theirs.expert)
                assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
                assert np.allclose(ours.routing, theirs.routing, atol=1e-4, equal_nan=True)


def test_a_right_guess_takes_one_pass_and_a_wrong_one_two(loaded: Loaded, passes: list[tuple[int, int]]) -> None:
    session = loaded[0].session()
    session.append(list(range(5, 25)))
    first = session.step()
    assert passes == [(20, 0), (0, 20)], "nobody is guessed for a prompt"
    seen, others = {True: 0, False: 0}, 0
    previous = first.expert
    for _ in range(60):
        passes.clear()
        lag = session.lags
        number = session._decoder.step.guess_expert()
        assert number is not None
        guess = loaded[0].expert_names[number]
        token = session.step()
        right = token.expert == guess
        assert passes == ([(1, lag[guess])] if right else [(1, lag[guess]), (0, lag[token.expert])])
        assert session.lags[guess] == (1 if right else lag[guess] + 1), "what was read on a wrong guess is taken back"
        seen[right] += 1
        others += guess != previous
        previous = token.expert
    assert all(count > 5 for count in seen.values()) and others > 5


def test_who_is_known_reads_in_the_router_s_passes(loaded: Loaded, passes: list[tuple[int, int]]) -> None:
    """A pinned expert reads the prompt with the router; a guessed one catches up with a few tokens, and not with many."""
    rt = loaded[0]
    ids = np.random.default_rng(1).integers(3, 290, 600).tolist()
    rt.session(expert="expert1").append(ids)
    session = rt.session(expert="expert1")
    session.append(ids)
    session.step()
    assert [sum(part) for part in zip(*passes, strict=True)] == [600, 600] and all(a == b for a, b in passes)
    passes.clear()
    session.append(ids[:3])
    session.step(lam=1.0)
    session._pinned = None
    session._decoder.step.guesses.last = 1
    session.step()
    assert passes[0] == (4, 0) and passes[1] == (1, 5)
    passes.clear()
    session._decoder.step.guesses.last = 1
    session.append(ids[:9])
    session.step()
    assert passes[0] == (10, 0)


def test_lags_of_hundreds_of_tokens(loaded: Loaded) -> None:
    sessions = [rt.session(expert="expert0") for rt in loaded]
    ids = np.random.default_rng(2).integers(3, 290, 700).tolist()
    for session in sessions:
        session.append(ids[:300])
    for turn, pinned in enumerate((0, 1, None, 2, 0, None)):
        for session in sessions:
            session._pinned = pinned
            session.append(ids[300 + 60 * turn : 360 + 60 * turn])
        ours, theirs = (session.step() for session in sessions)
        logits, expected = (session.logits for session in sessions)
        assert (ours.id, ours.expert) == (theirs.id, theirs.expert)
        assert np.abs(logits - expected).max() <= TOLERANCE * np.abs(expected).max() * 2


@pytest.mark.parametrize("options", [{}, {"catch_up": "background"}, {"speculation": "auto"}], ids=str)
def test_whole_texts_agree(shared: Path, merged: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    draft_always(monkeypatch)
    kinds: list[dict[str, Any]] = [
        {},
        {"lam": 1.0},
        {"lam": 0.0, "expert": "expert2"},
        {"expert": "expert1"},
        {"temperature": 0.8, "seed": 3},
    ]
    with FusionRuntime.load(shared, "fp32", "cpu", **options) as pair, FusionRuntime.load(merged, "fp32", "cpu") as full:
        drafted = 0
        for ids in prompts(6, pair.vocab_size):
            for settings in kinds if options.get("speculation") is None else kinds[:-1]:  # drafts draw other random numbers
                ours, theirs = pair.generate(ids, 24, **settings), full.generate(ids, 24, **settings)
                assert (ours.token_ids, ours.experts) == (theirs.token_ids, theirs.experts)
                assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
                drafted += ours.drafted
        assert (drafted > 100) == ("speculation" in options)


def test_drafts_are_verified_in_passes_of_both(
    shared: Path, passes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    draft_always(monkeypatch)
    with FusionRuntime.load(shared, "fp32", "cpu", speculation="auto") as rt:
        passes.clear()  # of the costs
        for ids in prompts(10, rt.vocab_size):
            rt.generate(ids, 24)
        both = {(a, b) for a, b in passes if a and b}
    assert any(a == b > 2 for a, b in both), "looked-up drafts"
    assert any(a == 1 and b > 2 for a, b in both), "the router's drafts"


def test_drafts_and_what_is_learnt_of_them_use_the_fusers_own_head(shared: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Buffers for the head are made with a fuser: one for a row, one for several; none for a draft."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    draft_always(monkeypatch)
    heads: list[BoundHead] = []
    init = BoundHead.__init__

    def noted(bound: BoundHead, head: Head) -> None:
        heads.append(bound)
        init(bound, head)

    monkeypatch.setattr(BoundHead, "__init__", noted)
    with FusionRuntime.load(shared, "int8", "cpu", speculation="auto") as rt:
        heads.clear()
        drafted = 0
        kinds: list[dict[str, Any]] = [{}, {"temperature": 0.8, "seed": 3}, {"repetition_penalty": 1.3}]
        for settings in kinds:
            drafted += sum(rt.generate(ids, 24, **settings).drafted for ids in prompts(6, rt.vocab_size))
    assert drafted > 100
    assert len(heads) <= 2, "one session, whose decoder the pool hands out again"


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_exact_tokens_depend_neither_on_guesses_nor_on_drafts(
    shared: Path, precision: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Bit for bit: the log-probabilities of every token are the same numbers."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    random = np.random.default_rng(0)

    def texts(guess: Any, **options: Any) -> list[Any]:
        with monkeypatch.context() as patch, FusionRuntime.load(shared, precision, "cpu", exact=True, **options) as rt:
            draft_always(patch)
            patch.setattr(PlainStep, "guess_expert", guess)
            return [(result.token_ids, result.experts, result.logprobs) for result in (rt.generate(ids, 24) for ids in prompts(8, 300))]

    def any_expert(step: PlainStep) -> int:
        return int(random.integers(3))

    expected = texts(lambda step: None)
    assert texts(PlainStep.guess_expert) == expected
    assert texts(any_expert) == expected
    assert texts(PlainStep.guess_expert, speculation="auto") == expected
    assert texts(any_expert, speculation="auto") == expected
    assert texts(PlainStep.guess_expert, catch_up="background") == expected


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_tokens_do_not_depend_on_guesses(shared: Path, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `exact` too: dummy tokens make a pass of one model round as a pass of two."""

    def texts(guess: Any) -> list[Any]:
        with monkeypatch.context() as patch, FusionRuntime.load(shared, precision, "cpu") as rt:
            patch.setattr(PlainStep, "guess_expert", guess)
            return [(result.token_ids, result.experts, result.logprobs) for result in (rt.generate(ids, 24) for ids in prompts(8, 300))]

    assert texts(lambda step: None) == texts(PlainStep.guess_expert)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_tokens_do_not_depend_on_what_other_sessions_have_read(shared: Path, precision: str) -> None:
    # not 65 tokens: attention then computes the last one alone, with whole models too
    start = list(range(5, 71))
    with FusionRuntime.load(shared, precision, "cpu") as lending, FusionRuntime.load(shared, precision, "cpu", prefix_cache=0) as anew:
        for tail in range(1, 8):
            for expert in (None, "expert1"):
                ours, theirs = (rt.generate([*start, *range(80, 80 + tail)], 8, expert=expert) for rt in (lending, anew))
                assert (ours.token_ids, ours.logprobs) == (theirs.token_ids, theirs.logprobs)


def test_scores_agree(loaded: Loaded) -> None:
    ids = np.random.default_rng(3).integers(3, 290, 150).tolist()
    for options in ({}, {"chunk": 37}, {"chunk": 1}, {"positions": [140, 3, 77]}, {"lam": 1.0}, {"lam": 0.0}):
        ours, theirs = (rt.score(ids, **options) for rt in loaded)
        assert np.array_equal(ours.experts, theirs.experts)
        assert np.abs(ours.logits - theirs.logits).max() <= TOLERANCE * np.abs(theirs.logits).max() * 2
        assert np.abs(ours.routing - theirs.routing).max() <= TOLERANCE * np.abs(theirs.routing).max() * 2


def test_a_session_in_each_thread_gives_what_one_thread_gives(shared: Path) -> None:
    with FusionRuntime.load(shared, "int8", "cpu", threads=1, catch_up="background") as rt:

        def text(number: int) -> list[tuple[int, str, float]]:
            session = rt.session()
            session.append([5 + number, *range(20, 100)])
            tokens = [session.step() for _ in range(20)]
            session.rewind(90)
            tokens += [session.step(temperature=1.0, seed=number) for _ in range(20)]
            return [(token.id, token.expert, token.logprob) for token in tokens]

        expected = [text(number) for number in range(4)]
        results: dict[int, Any] = {}
        threads = [threading.Thread(target=lambda number=number: results.update({number: text(number)})) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [results[number] for number in range(4)] == expected


def test_a_prompt_that_both_read_is_cancelled_in_the_middle(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second pass ends early; the next text is as if nothing had been."""
    rt = loaded[0]
    ids = np.random.default_rng(4).integers(3, 250, 600).tolist()
    whole, cancel, run = rt.generate(ids, 4, expert="expert0"), threading.Event(), PairBinding.run
    counts = 0

    def cancelled(binding: PairBinding, *arguments: Any) -> Any:
        nonlocal counts
        counts += 1
        if counts == 2:
            cancel.set()
            raise Interrupted  # what ONNX Runtime's end of a run becomes
        return run(binding, *arguments)

    rt.generate([9], 1)  # another text in the idle decoder
    with monkeypatch.context() as patch:
        patch.setattr(PairBinding, "run", cancelled)
        result = rt.generate(ids, 4, expert="expert0", cancel=cancel)
    assert counts == 2 and result.finish_reason == "cancelled" and not result.token_ids
    assert rt.generate(ids, 4, expert="expert0") == whole


def test_a_deadline_ends_a_prompt_that_both_read(loaded: Loaded) -> None:
    ids = np.random.default_rng(4).integers(3, 250, 900).tolist()
    assert loaded[0].generate(ids, 4, expert="expert0", deadline=0.0).finish_reason == "deadline"


def test_to_the_end_of_the_context(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no buffer has room for a dummy token any more."""
    ids = [5 + n % 50 for n in range(loaded[0].max_seq_len - 11)]
    for expert in (None, "expert0"):
        ours, theirs = (rt.generate(ids, 100, expert=expert) for rt in loaded)
        assert (ours.token_ids, ours.experts) == (theirs.token_ids, theirs.experts) and len(ours.token_ids) == 11
    with FusionRuntime.load(loaded[0].bundle.folder, "fp32", "cpu", exact=True) as exact:
        assert exact.generate(ids, 100).token_ids == loaded[1].generate(ids, 100).token_ids


def test_processes_share_its_weights(shared: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for precision in ("fp32", "int8"):
        results = []
        for share in (False, True):
            with FusionRuntime.load(shared, precision, "cpu", threads=1, share_weights=share) as rt:
                results.append(rt.generate(list(range(5, 30)), 12))
        assert results[0] == results[1]
    assert len(list((tmp_path / "fusionroute" / "packed").glob("*/weights.bin"))) == 4, "base and head, in each precision"


def test_drafts_of_both_sources_are_those_of_plain_decoding(shared: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    draft_always(monkeypatch)
    for options in (
        {"lam": 1.0},
        {"expert": "expert1", "lam": 0.0},
        {"expert": "expert1"},
        {"fusion": "additive"},
        {"repetition_penalty": 1.3},
    ):
        assert same(shared, "fp32", 6, False, **options) > 0
