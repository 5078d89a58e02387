"""Speculation loses nothing: greedy tokens are those of plain decoding, samples have the distribution of plain sampling."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import FusionRuntime, InputError
from runtime.backends.ort_cpu import OrtCache
from runtime.speculation import costs
from runtime.speculation.costs import MOST, SIZES, Costs
from runtime.speculation.lookup import LONGEST, SHORTEST, Lookup
from runtime.speculation.pace import Pace, Plan
from runtime.speculation.rejection import Distribution, certain, verify

Choose = Callable[..., Plan]
EVEN = Costs(router=(1.0, 1.1, 1.3, 1.9), expert=(1.0, 1.1, 1.3, 1.9), fusion=0.05)  # as models of one size on a CPU
LARGE = Costs(router=(1.0, 1.1, 1.3, 1.9), expert=(3.0, 3.3, 3.9, 5.7), fusion=0.05)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def draft_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft as often as the text allows, at random from both sources, whether it pays or not."""
    random = np.random.default_rng(0)

    def plan(self: Pace, most: int, looked_up: int, router: bool, expert: bool) -> Plan:
        if looked_up and most > 1 and random.random() < 0.5:
            return Plan("lookup", int(random.integers(2, min(looked_up + 1, most) + 1)))
        return Plan("router", int(random.integers(1, min(MOST, most) + 1)) if router and expert else 1)

    monkeypatch.setattr(Pace, "plan", plan)


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
            expected, found = plain.generate(ids, 24, **options), guessing.generate(ids, 24, **options)
            assert (found.token_ids, found.experts) == (expected.token_ids, expected.experts)
            assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
            assert expected.drafted == 0 and 0 <= found.accepted <= found.drafted
            drafted += found.drafted
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
    same(bundles[1], "fp32", 12, False, **options)


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
            found = rt.generate(ids, 12)
            if found.finish_reason == "length":
                assert names == {"router", *found.experts}


def test_what_models_have_read_agrees_with_the_text(bundles: list[Path], eager: None) -> None:
    """After rounds that ended anywhere, plain steps go on as from a text read anew."""
    with FusionRuntime.load(bundles[0], device="cpu", precision="fp32", speculation="auto") as rt:
        coefficients = rt.coefficients(rt.fusion, rt.lam)
        for ids in prompts(10, rt.vocab_size):
            session, fresh = rt.session(), rt.session()
            session.append(ids)
            for _ in range(5):
                session.advance_some(session._sampler, coefficients, None, 8)
            fresh.append(session.token_ids)
            for _ in range(3):
                token, expected = session.step(), fresh.step()
                assert token.id == expected.id and token.routing == pytest.approx(expected.routing, abs=1e-4)


@pytest.mark.parametrize("source", ["router", "lookup"])
def test_samples_have_the_distribution_of_plain_sampling(bundles: list[Path], monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """Two tokens together against their enumeration. The same test refuses a sampler that skips the residual."""
    monkeypatch.setattr(
        Pace, "plan", lambda self, most, looked_up, *_: Plan(source, min(most, 2, looked_up + 1 if source == "lookup" else 2))
    )
    assert distance(bundles[0], verify, source) < 1.0
    assert distance(bundles[0], careless, source) > 2.0


def careless(p: Distribution, q: Distribution, draft: int, random: np.random.Generator) -> int:
    """Verification that draws a refused token anew from p instead of from what is left of p."""
    if random.random() * q.at(np.array([draft]))[0] < p.at(np.array([draft]))[0]:
        return draft
    return p.draw(random.random())


def distance(folder: Path, check: Any, source: str) -> float:
    """χ² of pairs of sampled tokens against their enumerated probabilities, over its 99.9 % quantile."""
    draws = 700
    options: dict[str, Any] = {"temperature": 1.5, "top_k": 4}
    with pytest.MonkeyPatch.context() as patch, FusionRuntime.load(folder, device="cpu", precision="fp32", speculation="auto") as rt:
        patch.setattr("runtime.speculation.rounds.verify", check)

        def following(text: list[int]) -> dict[int, float]:
            row = rt.score(text, positions=[len(text) - 1]).logits[0].astype(np.float64) / 1.5
            top = np.argsort(-row, kind="stable")[:4]
            weights = np.exp(row[top] - row[top[0]])
            return dict(zip(top.tolist(), (weights / weights.sum()).tolist(), strict=True))

        ids = [7, 9, 30, 7, 9]
        if source == "lookup":  # what is looked up must be neither sure nor refused
            repeated = ([7, 9, token, 7, 9] for token in range(3, rt.vocab_size))
            ids = next(ids for ids in repeated if 0.2 < following(ids).get(ids[2], 0) < 0.8)
        expected = {(a, b): p * q for a, p in following(ids).items() for b, q in following([*ids, a]).items()}
        seen = Counter(tuple(rt.generate(ids, 2, seed=seed, **options).token_ids) for seed in range(draws))
    assert seen.keys() <= expected.keys()
    found = sum((seen[pair] - draws * p) ** 2 / (draws * p) for pair, p in expected.items())
    return float(found) / 37.7  # χ² with 15 degrees of freedom, 99.9 %


@given(st.integers(2, 6), st.booleans(), st.booleans(), st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_verified_tokens_are_distributed_as_the_target(size: int, sparse: bool, sure: bool, seed: int) -> None:
    random = np.random.default_rng(seed)
    p, q = random.dirichlet(np.ones(size), 2)
    ids = random.permutation(size).astype(np.int64) if sparse else None
    target = Distribution(ids, p if ids is None else p[ids])
    proposal = certain(int(random.integers(size))) if sure else Distribution(None, q)
    drawn = Counter(verify(target, proposal, proposal.draw(random.random()), random) for _ in range(4000))
    assert np.abs(np.array([drawn[token] for token in range(size)]) / 4000 - p).max() < 0.04


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 7))
def test_lookup_finds_what_a_search_finds(text: list[int], most: int) -> None:
    lookup = Lookup()
    for end in range(1, len(text) + 1):
        now = text[:end]
        expected: list[int] = []
        for size in range(min(LONGEST, end), SHORTEST - 1, -1):
            starts = [at + size for at in range(end - size) if now[at : at + size] == now[end - size :]]
            if starts:
                whole = now[starts[-1] :]
                expected = [whole[n % len(whole)] for n in range(most)]
                break
        assert lookup.propose(now, most) == expected


def test_guessing_stops_where_it_does_not_pay_and_comes_back() -> None:
    pace = Pace(EVEN)
    for _ in range(20):
        pace.saw("router", 0, 3)
        pace.saw("lookup", 0, 3)
    assert pace.plan(MOST, 7, True, True).rows == 1
    used = []
    for _ in range(300):
        plan = pace.plan(MOST, 7, True, True)
        used.append(plan.rows > 1)
        if plan.rows > 1:
            pace.saw(plan.source, 0, plan.rows - 1)
        pace.produced(1, 0)
    assert 0 < sum(used) <= 10  # tried again now and then, of each source


def test_guesses_are_as_many_as_pay() -> None:
    """Against the arithmetic, written out anew: expected tokens per expected second, over all lengths."""
    for known, accepted in itertools.product((EVEN, LARGE), (0.2, 0.6, 0.9)):
        pace = Pace(known)
        pace.produced(1000, 0)
        for _ in range(200):
            hits = np.random.default_rng(len(str(_))).random(3) < accepted
            pace.saw("router", int(np.argmin([*hits, False])), 3)
        a = pace.rates["router"].mean
        speeds = {
            rows: sum(a**n for n in range(rows))
            / (
                rows * known.router[0]
                + float(np.interp(rows, SIZES, known.expert))
                + sum(a**n for n in range(rows)) * known.fusion
                + pace.switches.mean * (sum(a**n for n in range(rows)) - 1) * known.expert[0]
            )
            for rows in range(1, MOST + 1)
        }
        assert pace.plan(MOST, 0, True, True).rows == max(speeds, key=speeds.__getitem__)


def test_costs_are_measured_once(bundles: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with FusionRuntime.load(bundles[0], device="cpu", precision="fp32", speculation="auto") as first:
        assert first.costs is not None and min(*first.costs.router, *first.costs.expert, first.costs.fusion) > 0
        monkeypatch.setattr(costs, "measure", None)
        with FusionRuntime.load(bundles[0], device="cpu", precision="fp32", speculation="auto") as second:
            assert second.costs == first.costs


def test_a_seed_gives_the_same_text_again(bundles: list[Path]) -> None:
    with FusionRuntime.load(bundles[0], device="cpu", precision="int8", speculation="auto") as rt:
        texts = [rt.generate([7, 9, 30, 7, 9], 40, temperature=1.0, seed=3).token_ids for _ in range(3)]
    assert texts[0] == texts[1] == texts[2]


def test_unknown_speculation_is_refused(bundles: list[Path]) -> None:
    with pytest.raises(InputError, match="speculation 'on'"):
        FusionRuntime.load(bundles[0], speculation="on")
