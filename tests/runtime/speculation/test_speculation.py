"""Speculation loses nothing: greedy tokens are those of plain decoding. Of samples see test_rejection.py."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionroute.runtime import FusionError, FusionRuntime, InputError
from fusionroute.runtime.backends.ort_cpu import OrtCache
from fusionroute.runtime.limits import MAX_ROUND_TOKENS
from fusionroute.runtime.options import fusion_coefficients
from fusionroute.runtime.speculation import costs
from fusionroute.runtime.speculation.costs import LENGTHS, SIZES, Costs, seconds_by_tokens
from fusionroute.runtime.speculation.draft_planner import MIN_SPEEDUP, DraftPlan, DraftPlanner
from fusionroute.runtime.speculation.lookup import MAX_NGRAM, MIN_NGRAM, Lookup
from tests.support.bundles import copy_with_ends

Choose = Callable[..., DraftPlan]
ONE = ((1.0, 1.1, 1.3, 1.9), (1.1, 1.3, 1.7, 2.7))  # short and long texts
THREE = tuple(tuple(3 * seconds for seconds in passes) for passes in ONE)
SHORT = "fusionroute.runtime.speculation.draft_planner.MIN_STEP_SECONDS"
LINEAR = ((1.0, 2.0, 4.0, 8.0),) * 2
EVEN = Costs(router=ONE, experts=(ONE, ONE, ONE), fusion=0.05)  # as models of one size on a CPU
LARGE = Costs(router=ONE, experts=(THREE, THREE, THREE), fusion=0.05)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(SHORT, 0.0)  # the models here are small


def draft_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft as often as the text allows, at random from both sources, whether it pays or not."""
    random = np.random.default_rng(0)

    def plan(self: DraftPlanner, most: int, looked_up: int, router: bool, expert: int | None, length: int) -> DraftPlan:
        if looked_up and most > 1 and random.random() < 0.5:
            return DraftPlan("lookup", int(random.integers(2, min(looked_up + 1, most) + 1)))
        return DraftPlan("router", int(random.integers(1, min(MAX_ROUND_TOKENS, most) + 1)) if router and expert is not None else 1)

    monkeypatch.setattr(DraftPlanner, "plan", plan)
    monkeypatch.setattr(SHORT, 0.0)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    draft_always(monkeypatch)


def prompts(count: int, vocab: int, seed: int = 0) -> Iterator[list[int]]:
    """Random token ids, half of them with a part that stands twice, so that something can be looked up."""
    random = np.random.default_rng(seed)
    for number in range(count):
        ids = random.integers(3, vocab, random.integers(1, 40)).tolist()
        yield ids + ids[: len(ids) // 2] if number % 2 else ids


def same(folder: Path, precision: str, count: int, exact: bool, **options: Any) -> int:
    """Compare `count` prompts; how many tokens were drafted."""
    drafted = 0
    settings: dict[str, Any] = {"precision": precision, "device": "cpu", "exact": exact}
    with FusionRuntime.load(folder, **settings) as plain, FusionRuntime.load(folder, speculation="auto", **settings) as guessing:
        for ids in prompts(count, plain.vocab_size):
            expected, result = plain.generate(ids, 24, **options), guessing.generate(ids, 24, **options)
            assert (result.token_ids, result.experts) == (expected.token_ids, expected.experts)
            assert result.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
            assert expected.drafted == 0 and 0 <= result.accepted <= result.drafted
            drafted += result.drafted
    return drafted


@pytest.mark.parametrize(("precision", "exact"), [("fp32", False), ("fp32", True), ("int8", True)])
def test_greedy_output_is_that_of_plain_decoding(bundles: list[Path], eager: None, precision: str, exact: bool) -> None:
    for folder in bundles:
        assert same(folder, precision, 30, exact) > 200


@pytest.mark.parametrize(
    "options",
    [{"lam": 1.0}, {"lam": 0.0}, {"fusion": "additive"}, {"repetition_penalty": 1.3}, {"pin": 1}, {"pin": 0, "lam": 0.0}],
    ids=str,
)
def test_greedy_output_is_the_same_with_every_option(bundles: list[Path], eager: None, options: dict[str, Any]) -> None:
    with FusionRuntime.load(bundles[1], device="cpu", precision="fp32") as rt:
        names = rt.expert_names
    options = {name: value for name, value in options.items() if name != "pin"} | (
        {"expert": names[options["pin"]]} if "pin" in options else {}
    )
    assert same(bundles[1], "fp32", 12, False, **options) > 0


def test_to_the_end_of_the_context(bundles: list[Path], eager: None) -> None:
    for exact in (False, True):
        with FusionRuntime.load(bundles[0], device="cpu", precision="fp32", exact=exact, speculation="auto") as rt:
            ids = [5 + n % 50 for n in range(rt.max_seq_len - 11)]
            guessed = rt.generate(ids, 100)
            session = rt.session()
            session.append(ids)
            assert guessed.token_ids == [session.step().id for _ in range(len(guessed.token_ids))]
            assert guessed.finish_reason == "length" and len(guessed.token_ids) == 11


def test_an_expert_whose_turn_never_came_did_not_run(bundles: list[Path], eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    names: set[str] = set()
    forward = OrtCache.forward

    def noted(cache: OrtCache, *arguments: Any) -> Any:
        names.add(cache._model.model.name)
        return forward(cache, *arguments)

    with FusionRuntime.load(bundles[0], device="cpu", precision="fp32", speculation="auto") as rt:
        monkeypatch.setattr(OrtCache, "forward", noted)
        for ids in prompts(20, rt.vocab_size):
            names.clear()
            result = rt.generate(ids, 12)
            if result.finish_reason == "length":
                assert names == {"router", *result.experts}


def test_exact_reads_and_answers_by_twos(bundles: list[Path], eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 4 bits the last row of an odd number has the kernel of a single one."""
    counts: list[tuple[int, int]] = []
    forward = OrtCache.forward

    def noted(cache: OrtCache, ids: Any, positions: Any) -> Any:
        counts.append((len(ids), len(positions)))
        return forward(cache, ids, positions)

    with FusionRuntime.load(bundles[0], device="cpu", precision="int8", speculation="auto", exact=True) as rt:
        monkeypatch.setattr(OrtCache, "forward", noted)
        for ids in prompts(10, rt.vocab_size):
            rt.generate(ids, 12)
        rt.score([5, 6, 7], chunk=2)
    assert len(counts) > 50 and all(read % 2 == answered % 2 == 0 for read, answered in counts)


def test_what_models_have_read_agrees_with_the_text(bundles: list[Path], eager: None) -> None:
    """After rounds that ended anywhere, plain steps go on as from a text read anew."""
    with FusionRuntime.load(bundles[0], device="cpu", precision="fp32", speculation="auto") as rt:
        coefficients = fusion_coefficients(rt.fusion, rt.lam)
        for ids in prompts(10, rt.vocab_size):
            session, fresh = rt.session(), rt.session()
            session.append(ids)
            for _ in range(5):
                session._decoder.advance_some(session._sampler, coefficients, None, 8)
            fresh.append(session.token_ids)
            for _ in range(3):
                token, expected = session.step(), fresh.step()
                assert token.id == expected.id and token.routing == pytest.approx(expected.routing, abs=1e-4)


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 7))
def test_lookup_finds_what_a_search_finds(text: list[int], most: int) -> None:
    lookup = Lookup()
    for end in range(1, len(text) + 1):
        now = text[:end]
        expected: list[int] = []
        for size in range(min(MAX_NGRAM, end), MIN_NGRAM - 1, -1):
            starts = [at + size for at in range(end - size) if now[at : at + size] == now[end - size :]]
            if starts:
                whole = now[starts[-1] :]
                expected = [whole[n % len(whole)] for n in range(most)]
                break
        assert lookup.propose(now, most) == expected


class Counted(list[int]):
    """Token ids that count how often they are read."""

    reads = 0

    def __getitem__(self, place: Any) -> Any:
        Counted.reads += 1
        return super().__getitem__(place)


def test_lookup_reads_a_text_once_however_often_it_is_asked() -> None:
    lookup, tokens, most = Lookup(), Counted(), 7
    Counted.reads = 0
    for token in np.random.default_rng(0).integers(0, 4, 2000).tolist():
        tokens.append(token)
        lookup.propose(tokens, most)
    sizes = MAX_NGRAM - MIN_NGRAM + 1
    assert Counted.reads <= len(tokens) * (2 * sizes + most), "n-grams of one new token, the search for the last ones, the drafts"


def speed(known: Costs, source: str, rows: int, rate: float, switches: float, length: int) -> float:
    """Tokens per second of rounds of so many rows, written out anew."""
    at = [int(np.clip(length, *LENGTHS)) for _ in SIZES]
    router, expert = (
        np.interp(range(1, rows + 1), SIZES, [np.interp(n, LENGTHS, ends) for n, ends in zip(at, zip(*passes, strict=True), strict=True)])
        for passes in (known.router, known.experts[1])
    )
    tokens = sum(rate**n for n in range(rows))
    drafting = rows * router[0] if source == "router" else router[-1]
    return float(tokens / (drafting + expert[-1] + switches * (tokens - 1) * expert[0] + tokens * known.fusion))


@pytest.mark.parametrize("known", [EVEN, LARGE], ids=["even", "large"])
@pytest.mark.parametrize("rate", [0.2, 0.6, 0.9])
@pytest.mark.parametrize("length", [5, 500, 5000])
def test_drafts_are_as_many_as_pay(known: Costs, rate: float, length: int) -> None:
    planner, random = DraftPlanner(known), np.random.default_rng(0)
    planner.produced(1000, 0)
    for _ in range(400):
        for source, share in (("router", rate), ("lookup", rate / 2)):
            hits = random.random(3) < share
            planner.saw(source, int(np.argmin([*hits, False])), 3)
    choices = [("router", rows) for rows in range(1, MAX_ROUND_TOKENS + 1)] + [("lookup", rows) for rows in range(2, 6)]
    speeds = {
        (source, rows): speed(known, source, rows, planner.rates[source].mean, planner.switches.mean, length) for source, rows in choices
    }
    speeds["router", 1] *= MIN_SPEEDUP
    plan = planner.plan(MAX_ROUND_TOKENS, 4, True, 1, length)
    assert (plan.source, plan.rows) == max(speeds, key=speeds.__getitem__)


def test_models_that_run_side_by_side_leave_less_to_gain() -> None:
    planner = DraftPlanner(replace(EVEN, concurrent=True))
    for _ in range(100):
        planner.saw("lookup", 3, 3)
        planner.saw("router", 3, 3)
    planner.produced(1000, 0)
    assert DraftPlanner(EVEN, rates=planner.rates, switches=planner.switches).plan(MAX_ROUND_TOKENS, 0, True, 1, 32).rows > 1
    assert planner.plan(MAX_ROUND_TOKENS, 0, True, 1, 32).rows == 1, "a router step per draft costs what a plain token does"
    assert planner.plan(MAX_ROUND_TOKENS, 7, True, 1, 32).rows == MAX_ROUND_TOKENS


def test_without_reading_alone_a_plain_step_costs_two_tokens() -> None:
    assert seconds_by_tokens(ONE, 0, exact=True)[1] == seconds_by_tokens(ONE, 0)[2] == 1.1


def test_acceptance_is_learnt_without_drafting(bundles: list[Path]) -> None:
    """Rates are those of a recount of the same text, though nothing was drafted; drafting begins once it pays."""
    with FusionRuntime.load(bundles[0], device="cpu", precision="fp32", speculation="auto") as rt:
        rt._costs = Costs(LINEAR, (LINEAR,) * len(rt.expert_names), 0.1)  # several cost what they cost one by one
        kinds: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 1}]
        for options in kinds:
            session = rt.session()
            session.append([7, 9, 30, 7, 9])
            tokens = [session.steps(8, **options)[0] for _ in range(100)]
            assert session.drafted == 0 and session._decoder.rounds is not None
            planner = session._decoder.rounds.planner
            own = rt.score(session.token_ids, lam=1.0).logits[4:-1].astype(np.float64)
            ids = [token.id for token in tokens]
            q = np.exp(own - own.max(-1, keepdims=True))
            q = (q / q.sum(-1, keepdims=True))[range(100), ids]
            seen = np.minimum(1, q / np.exp([token.logprob for token in tokens])) if options else own.argmax(-1) == ids
            weights = 0.97 ** np.arange(100)[::-1]
            expected = (seen @ weights + 0.5 * 0.97**100) / (weights.sum() + 0.97**100)
            assert planner.rates["router"].mean == pytest.approx(expected, abs=1e-3)
            planner.costs = replace(EVEN, router=((0.01,) * 4,) * 2, experts=(((1.0,) * 4,) * 2,) * 2)
            planner._priced = (-1, -1)
            assert len(session.steps(8)) >= 1 and session.drafted > 0


def test_steps_of_less_than_a_millisecond_are_left_alone(bundles: list[Path], eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SHORT, 1e-3)
    for seconds, drafts in ((4e-4, False), (6e-4, True)):
        known = ((seconds,) * 4,) * 2
        monkeypatch.setattr("fusionroute.runtime.speculation.costs.costs_of", lambda *_, known=known: Costs(known, (known,) * 2, 1e-5))
        with FusionRuntime.load(bundles[0], device="cpu", precision="fp32", speculation="auto") as rt:
            assert (rt.generate([7, 9, 30, 7, 9], 20).drafted > 0) == drafts


def test_costs_are_measured_once(bundles: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with FusionRuntime.load(bundles[0], device="cpu", precision="fp32", speculation="auto") as first:
        assert first._costs is not None and first._costs.fusion > 0 and len(first._costs.experts) == len(first.expert_names)
        for passes in (first._costs.router, *first._costs.experts):
            assert len(passes) == 2 and all(seconds > 0 for length in passes for seconds in length)
        monkeypatch.setattr(costs, "measure", None)
        with FusionRuntime.load(bundles[0], device="cpu", precision="fp32", speculation="auto") as second:
            assert second._costs == first._costs


def test_a_seed_gives_the_same_text_again(bundles: list[Path]) -> None:
    with FusionRuntime.load(bundles[0], device="cpu", precision="int8", speculation="auto") as rt:
        texts = [rt.generate([7, 9, 30, 7, 9], 40, temperature=1.0, seed=3).token_ids for _ in range(3)]
    assert texts[0] == texts[1] == texts[2]


def test_a_sampled_text_begins_as_a_longer_one_does(bundles: list[Path], eager: None) -> None:
    for seed in range(5):
        texts = []
        for count in (13, 40):
            draft_always_again = np.random.default_rng(seed)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    DraftPlanner,
                    "plan",
                    lambda self, most, *_, random=draft_always_again: DraftPlan("router", min(most, int(random.integers(1, 9)))),
                )
                with FusionRuntime.load(bundles[0], device="cpu", precision="fp32", speculation="auto") as rt:
                    texts.append(rt.generate([7, 9, 30], count, temperature=1.0, seed=seed).token_ids)
        assert texts[1][:13] == texts[0]


def test_any_mixture_of_steps_rounds_rewinds_and_errors(bundles: list[Path], eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors strike before and after a model has read; what follows is the text of plain steps all the same."""
    random = np.random.default_rng(5)
    forward, trouble = OrtCache.forward, [0.0]

    def failing(cache: OrtCache, *arguments: Any) -> Any:
        if random.random() < trouble[0] / 2:
            raise FusionError("before")
        answer = forward(cache, *arguments)
        if random.random() < trouble[0] / 2:
            raise FusionError("after")
        return answer

    monkeypatch.setattr(OrtCache, "forward", failing)
    struck = 0
    with FusionRuntime.load(bundles[0], device="cpu", precision="fp32", speculation="auto") as rt:
        for ids in prompts(5, rt.vocab_size, seed=1):
            plain = rt.session()
            plain.append(ids)
            expected = [*ids, *(plain.step().id for _ in range(60))]
            session = rt.session()
            session.append(ids)
            while len(session) < len(ids) + 40:
                trouble[0] = 0.1
                try:
                    if (kind := random.integers(8)) == 0:
                        session.rewind(int(random.integers(len(ids), len(session) + 1)))
                    elif kind < 3:
                        session.step()
                    else:
                        session.steps(int(random.integers(1, 9)))
                except FusionError:
                    struck += 1
                finally:
                    trouble[0] = 0.0
                assert session.token_ids == expected[: len(session)]
    assert struck > 20


def test_nothing_is_read_behind_the_end_of_a_text(
    bundles: list[Path], eager: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token in turn is made the end: texts end where plain ones do, and no round goes on behind the end."""
    monkeypatch.setattr("fusionroute.runtime.speculation.costs.costs_of", lambda *_: EVEN)
    with FusionRuntime.load(bundles[0], device="cpu", precision="fp32") as plain:
        long = plain.generate([7, 9, 30], 30).token_ids
    for end in set(long):
        folder = copy_with_ends(bundles[0], tmp_path / f"ends at {end}", [end])
        with FusionRuntime.load(folder, device="cpu", precision="fp32", speculation="auto") as rt:
            result = rt.generate([7, 9, 30], 30)
            assert (result.token_ids, result.finish_reason) == (long[: long.index(end)], "stop")
            session = rt.session()
            session.append([7, 9, 30])
            for _ in range(8):
                tokens = session.steps(8)
                assert all(token.id != end for token in tokens[:-1])


def test_cancelling_ends_a_round_between_its_tokens(bundles: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DraftPlanner, "plan", lambda self, most, *_: DraftPlan("router", min(most, 8)))
    cancel = threading.Event()
    with FusionRuntime.load(bundles[0], device="cpu", precision="fp32", speculation="auto") as rt:
        stream = rt.stream([7, 9, 30], 40, cancel=cancel)
        got = [next(stream)]
        cancel.set()
        assert len([*got, *stream]) <= 2 and stream.finish_reason == "cancelled"


def test_rounds_of_no_token_are_refused(bundles: list[Path]) -> None:
    with FusionRuntime.load(bundles[0], device="cpu", precision="fp32") as rt:
        session = rt.session()
        session.append([7, 9])
        with pytest.raises(InputError, match="most=0"):
            session.steps(0)


def test_unknown_speculation_is_refused(bundles: list[Path]) -> None:
    with pytest.raises(InputError, match="speculation 'on'"):
        FusionRuntime.load(bundles[0], speculation="on")
