"""Speculation loses nothing: greedy tokens are those of plain decoding. Of samples see test_rejection.py."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusionroute.runtime import FusionError, FusionRuntime, InputError
from fusionroute.runtime.backends.ort_cpu import OrtCache
from fusionroute.runtime.options import fusion_coefficients
from fusionroute.runtime.speculation.draft_planner import DraftPlan, DraftPlanner
from tests.support.bundles import copy_with_ends
from tests.support.speculation import EVEN, prompts, same


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


def test_one_text_may_go_without_drafts(bundles: list[Path], eager: None) -> None:
    with FusionRuntime.load(bundles[0], "fp32", "cpu", speculation="auto") as rt:
        drafting, plain = rt.generate([5, 6, 7, 5, 6], 24), rt.generate([5, 6, 7, 5, 6], 24, drafts=False)
        assert drafting.drafted > 0 == plain.drafted and drafting.token_ids == plain.token_ids
        with pytest.raises(InputError, match=r"^drafts is 'no', expected True or False\.$"):
            rt.generate([5], 2, drafts="no")  # type: ignore[arg-type]
