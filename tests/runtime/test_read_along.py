"""Experts that read along: a wrong guess costs nothing then, and tokens are those of passes of two."""

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.adapters.expert_files import remove_expert
from fusionroute.runtime.backends.expert_segments import SegmentCache, SegmentPasses
from fusionroute.runtime.plain_step import PlainStep
from fusionroute.runtime.read_along import PassPrices, ReadAlong
from fusionroute.runtime.speculation import pass_prices
from fusionroute.runtime.speculation.costs import VALID
from fusionroute.runtime.speculation.draft_planner import DraftPlanner
from fusionroute.runtime.speculation.pass_prices import read_prices
from tests.support.numpy_adapters import write_adapter
from tests.support.read_along import ALWAYS, NEVER, priced
from tests.support.session_actions import ACTIONS, TOLERANCE, act
from tests.support.sparing import sparing
from tests.support.speculation import EVEN, draft_always, prompts

Passes = list[dict[int, int]]


def load(monkeypatch: pytest.MonkeyPatch, prices: PassPrices, folder: Path, precision: str, **options: Any) -> FusionRuntime:
    with monkeypatch.context() as patch:
        priced(patch, prices)
        return FusionRuntime.load(folder, precision, "cpu", **options)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    """How many tokens everybody reads in each pass from now on, by their places: 0 is the router's."""
    noted: Passes = []
    run = SegmentPasses.run

    def noting(self: SegmentPasses, parts: Any) -> Any:
        noted.append({cache.model.place: len(segment.ids) for cache, segment in parts})
        return run(self, parts)

    monkeypatch.setattr(SegmentPasses, "run", noting)
    return noted


def texts(rt: FusionRuntime, tokens: int = 24, **options: Any) -> list[Any]:
    results = [rt.generate(ids, tokens, **options) for ids in prompts(3, 300)]
    return [(result.token_ids, result.experts, result.logprobs) for result in results]


def test_once_all_read_along_a_token_takes_one_pass(segments: Path, monkeypatch: pytest.MonkeyPatch, passes: Passes) -> None:
    with load(monkeypatch, ALWAYS, segments, "fp32") as rt:
        session = rt.session()
        session.append(list(range(5, 25)))
        experts = [session.step().expert for _ in range(40)]
        assert passes[:2] == [{0: 20}, {rt.expert_names.index(experts[0]) + 1: 20}], "nobody reads a prompt along"
        passes.clear()
        switches = 0
        for _ in range(30):
            token = session.step()
            switches += token.expert != experts[-1]
            experts.append(token.expert)
        assert passes == [{0: 1, 1: 1, 2: 1, 3: 1}] * 30 and switches > 5
        assert set(session.lags.values()) == {1}


def test_only_experts_that_are_near_read_along(segments: Path, monkeypatch: pytest.MonkeyPatch, passes: Passes) -> None:
    """Those that have answered in this text, and lag by no more than eight tokens."""
    with load(monkeypatch, ALWAYS, segments, "fp32") as rt:
        session = rt.session()
        session.append(list(range(5, 25)))
        for _ in range(40):
            session.step()
        session.append([7] * 7)  # with the token that nobody has read: a lag of eight
        passes.clear()
        session.step()
        assert passes == [{0: 8, 1: 8, 2: 8, 3: 8}]
        session.append([7] * 8)
        passes.clear()
        session.step()
        assert passes[0] == {0: 9} and len(passes) == 2
        session.rewind(len(session) - 1)
        passes.clear()
        session.step()
        assert len(passes[0]) <= 2, "what was learnt of the text is forgotten with it"


@pytest.mark.parametrize("precision", sparing(("fp32", "int8", "int4"), ("int4",)))
def test_exact_tokens_are_those_of_passes_of_two(precision: str, segments: Path, monkeypatch: pytest.MonkeyPatch, passes: Passes) -> None:
    """Bit for bit; without `exact` they round differently, as a catch-up of several tokens differs from single ones."""
    results = []
    for prices, exact in ((NEVER, True), (ALWAYS, True), (NEVER, False), (ALWAYS, False)):
        passes.clear()
        with load(monkeypatch, prices, segments, precision, exact=exact) as rt:
            results.append(texts(rt))
        assert any(len(each) > 2 for each in passes) == (prices is ALWAYS)
    assert results[0] == results[1]
    if precision == "fp32":
        for ours, theirs in zip(results[2], results[3], strict=True):
            assert ours[:2] == theirs[:2] and ours[2] == pytest.approx(theirs[2], abs=1e-4)


@pytest.mark.parametrize("precision", sparing(("int8", "int4"), ("int8",)))
def test_tokens_depend_neither_on_guesses_nor_on_other_texts(precision: str, segments: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)

    def any_expert(step: PlainStep) -> int | None:
        return int(random.choice([each for each in range(3) if each in step._near()] or [0])) if step._near() else None

    results = []
    for guess in (PlainStep.guess_expert, lambda step: None, any_expert):
        with monkeypatch.context() as patch, load(monkeypatch, ALWAYS, segments, precision) as rt:
            patch.setattr(PlainStep, "guess_expert", guess)
            results.append(texts(rt))
    assert results[0] == results[1] == results[2]
    start = list(range(5, 71))
    with load(monkeypatch, ALWAYS, segments, precision) as lending, load(monkeypatch, ALWAYS, segments, precision, prefix_cache=0) as anew:
        for tail in (1, 4, 7):
            ours, theirs = (rt.generate([*start, *range(80, 80 + tail)], 24) for rt in (lending, anew))
            assert (ours.token_ids, ours.logprobs) == (theirs.token_ids, theirs.logprobs)


@pytest.fixture(scope="module")
def loaded(segments: Path) -> Iterator[tuple[FusionRuntime, FusionRuntime]]:
    patch = pytest.MonkeyPatch()
    with load(patch, ALWAYS, segments, "fp32") as ours, load(patch, NEVER, segments, "fp32") as theirs:
        yield ours, theirs


@settings(max_examples=5, deadline=None)
@given(st.lists(st.integers(3, 299), min_size=1, max_size=30), st.lists(ACTIONS, min_size=1, max_size=8))
def test_sessions_agree_whatever_is_done_with_them(
    loaded: tuple[FusionRuntime, FusionRuntime], prompt: list[int], actions: list[Any]
) -> None:
    sessions = [rt.session() for rt in loaded]
    for session in sessions:
        session.append(prompt)
    for action, *arguments in [*actions, ("step", 1, {})]:
        for session in sessions:
            act(session, action, arguments)
        if action == "step":
            for _ in range(2 * arguments[0]):
                ours, theirs = (session.step(**arguments[1]) for session in sessions)
                logits, expected = (session.logits for session in sessions)
                assert np.abs(logits - expected).max() <= TOLERANCE * np.abs(expected).max() * 2
                assert (ours.id, ours.expert) == (theirs.id, theirs.expert)


def test_drafts_agree_too(segments: Path, monkeypatch: pytest.MonkeyPatch, passes: Passes, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with load(monkeypatch, NEVER, segments, "fp32") as rt:
        expected = texts(rt)
    with monkeypatch.context() as patch, load(monkeypatch, ALWAYS, segments, "fp32", speculation="auto") as rt:
        draft_always(patch)
        passes.clear()
        ours = texts(rt)
    assert any(len(each) > 2 and max(each.values()) > 1 for each in passes), "experts catch up with drafts that held"
    for one, other in zip(ours, expected, strict=True):
        assert one[:2] == other[:2] and one[2] == pytest.approx(other[2], abs=1e-4)


def test_to_the_end_of_the_context(loaded: tuple[FusionRuntime, FusionRuntime]) -> None:
    ids = [5 + n % 50 for n in range(loaded[0].max_seq_len - 31)]
    ours, theirs = (rt.generate(ids, 100) for rt in loaded)
    assert (ours.token_ids, ours.experts) == (theirs.token_ids, theirs.experts) and len(ours.token_ids) == 31


def test_experts_come_and_go(segments: Path, monkeypatch: pytest.MonkeyPatch, passes: Passes, tmp_path: Path) -> None:
    """Bit for bit as in a bundle with the same experts, whose rows keep their places."""
    copy = Path(shutil.copytree(segments, tmp_path / "copy"))
    adapter = write_adapter(segments, tmp_path / "adapter", 3, rank=6)
    with load(monkeypatch, ALWAYS, segments, "int8") as rt:
        before = texts(rt)
        rt.remove_expert("expert1")
        remove_expert(copy, "expert1")
        with load(monkeypatch, ALWAYS, copy, "int8") as expected:
            passes.clear()
            assert texts(rt) == texts(expected) != before
            assert {0: 1, 1: 1, 3: 1} in passes
            for runtime in (rt, expected):
                runtime.add_expert(adapter, "expert1")
            assert texts(rt) == texts(expected) != before


def test_a_session_in_each_thread_gives_what_one_thread_gives(segments: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(monkeypatch, ALWAYS, segments, "int8", threads=1) as rt:
        results: dict[int, Any] = {}

        def text(number: int) -> list[tuple[int, str, float]]:
            session = rt.session()
            session.append([5 + number, *range(20, 60)])
            return [(token.id, token.expert, token.logprob) for token in (session.step() for _ in range(30))]

        expected = [text(number) for number in range(4)]
        threads = [threading.Thread(target=lambda number=number: results.update({number: text(number)})) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [results[number] for number in range(4)] == expected


def test_experts_that_read_in_the_background_do_not_read_along(segments: Path, monkeypatch: pytest.MonkeyPatch, passes: Passes) -> None:
    """How far they lag depends on the clock."""
    with load(monkeypatch, ALWAYS, segments, "int8", catch_up="background") as rt:
        texts(rt)
    assert max(map(len, passes)) == 2


def test_it_pays_where_guesses_would_often_be_wrong() -> None:
    """pair 60, all of three 80, alone 60: a third of the steps must be spared a second pass, or a sixth if two read."""
    for share, near, pays in ((0.30, {0, 1, 2}, False), (0.36, {0, 1, 2}, True), (0.14, {0, 2}, False), (0.19, {0, 2}, True)):
        along = ReadAlong(PassPrices(60, 80, 60, 3), answered={0, 1, 2})
        along.spared.hits, along.spared.trials = share * 100, 100
        assert along.readers(near) == (sorted(near) if pays else [])
        assert along.readers({0}) == [] and ReadAlong(None, along.spared, answered={0, 1, 2}).readers(near) == []
    along = ReadAlong(PassPrices(60, 60, 60, 3))
    for expert in (0, 1, 0, 1):
        along.saw(5, expert, {0, 1, 2})
    assert along.readers({0, 1, 2}) == [0, 1], "who has read in another text alone does not count"
    share = along.spared.mean
    along.saw(5, 2, {0, 1, 2})
    assert along.spared.mean < share, "nor would it have read along"
    along = ReadAlong(PassPrices(60, 80, 60, 3))
    for number in range(100):  # an expert after the other, behind tokens that stand there once
        along.saw(number, number % 3, {0, 1, 2})
    assert along.spared.mean > 0.9 and along.readers({0, 1, 2}) == [0, 1, 2]
    for number in range(100):  # always the same ones behind the same tokens
        along.saw(number % 3, number % 3, {0, 1, 2})
    assert along.spared.mean < 0.1


def test_a_step_in_which_all_read_is_priced_as_one_pass() -> None:
    """Passes of two are expected to miss at half of the tokens at first: drafts are judged against what a step takes."""
    planner = DraftPlanner(EVEN)
    assert planner.plan(8, 7, True, 1, 32).rows > 1
    assert planner.plan(8, 7, True, 1, 32, plain=0.1).rows == 1


def test_prices_are_measured_once_a_month(segments: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured: list[int] = []
    measure = pass_prices.measure

    def noted(bundle: Any, backend: Any, size: int) -> PassPrices:
        measured.append(size)
        return measure(bundle, backend, size)

    monkeypatch.setattr(pass_prices, "measure", noted)
    for exact in (False, True, False, True):
        with FusionRuntime.load(segments, "fp32", "cpu", exact=exact) as rt:
            prices = rt._sets.current.prices
            assert prices is not None and prices.experts == 3 and min(prices.pair, prices.every, prices.alone) > 0
    assert measured == [1, 2]
    files = list((tmp_path / "fusionroute" / "costs").glob("*.json"))
    assert prices in [read_prices(file, lambda: time.time() + VALID - 60) for file in files]
    assert [read_prices(file, lambda: time.time() + VALID + 60) for file in files] == [None, None]
    assert read_prices(tmp_path / "none.json") is None


def test_graphs_for_two_have_no_prices(shared: Path) -> None:
    with FusionRuntime.load(shared, "fp32", "cpu") as rt:
        assert rt._sets.current.prices is None and rt.backend.forward_together is None


def test_processes_share_its_weights(segments: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    results = []
    for share in (False, True):
        with load(monkeypatch, ALWAYS, segments, "int8", threads=1, share_weights=share) as rt:
            results.append(texts(rt, 12))
    assert results[0] == results[1]
    assert len(list((tmp_path / "fusionroute" / "packed").glob("*/weights.bin"))) == 2, "base and head"


def test_caches_copy_what_others_have_read(segments: Path) -> None:
    ids = list(range(3, 63))
    with FusionRuntime.load(segments, "int8", "cpu") as rt:
        for model in (rt.backend.router, rt.backend.experts[2]):
            lender, borrower = model.cache(), model.cache()
            assert isinstance(lender, SegmentCache) and isinstance(borrower, SegmentCache)
            lender.forward(ids[:40], (39,))
            borrower.copy_prefix(lender, 30)
            ours, whole = borrower.forward(ids[30:], (29,)), model.cache().forward(ids, (59,))
            assert np.array_equal(ours.logits.states, whole.logits.states)
