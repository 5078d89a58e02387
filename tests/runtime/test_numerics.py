"""NaN and infinity: noticed where they first matter, named by model, precision and position, and gone when their cause is."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusionroute.runtime import FusionError, FusionRuntime, InputError, NumericalError, Session
from fusionroute.runtime.backend import Output
from fusionroute.runtime.backends.ort_cpu import OrtCache
from fusionroute.runtime.decoder import LOG
from fusionroute.runtime.numerics import MEND
from tests.support.speculation import draft_always

PROMPT = list(range(5, 45))
LAST = len(PROMPT) - 1
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 1.0, "seed": 1, "top_k": 5},
    {"temperature": 1.0, "seed": 1, "top_p": 0.9, "min_p": 0.1},
    {"repetition_penalty": 1.2},
    {"temperature": 0.7, "seed": 1, "repetition_penalty": 1.2},
]
Fault = Callable[[str, Output], Output]


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Fault | None], None]]:
    """Set what every pass of every model gives instead of its output: (the model's name, output) → output."""
    current: list[Fault | None] = [None]
    forward = OrtCache.forward

    def faulty(cache: OrtCache, ids: Any, positions: Any) -> Output:
        output = forward(cache, ids, positions)
        return output if current[0] is None else current[0](cache._model.model.name, output)

    monkeypatch.setattr(OrtCache, "forward", faulty)
    yield lambda new: current.__setitem__(0, new)


def wrong_logits(model: str, value: float) -> Fault:
    """One value for a token in all rows of a model's logits; −inf for all tokens."""

    def change(name: str, output: Output) -> Output:
        if name != model:
            return output
        logits = np.array(output.logits)
        logits[:, slice(None) if value == -np.inf else 7] = value
        return output._replace(logits=logits)

    return change


def wrong_routing(value: float) -> Fault:
    """One value for the last expert in all rows of routing scores."""

    def change(name: str, output: Output) -> Output:
        if output.routing is None:
            return output
        routing = np.array(output.routing)
        routing[:, -1] = value
        return output._replace(routing=routing)

    return change


def sentence(what: str, precision: str, position: int = LAST) -> str:
    return f"The {what} in {precision} hold NaN or infinity at position {position}: {MEND}."


def failing(call: Callable[[], object]) -> NumericalError:
    with pytest.raises(NumericalError) as caught:
        call()
    return caught.value


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("speculation", ["off", "auto"])
def test_what_is_not_finite_ends_in_one_error_whatever_chooses_the_token(
    bundles: list[Path], fault: Callable[[Fault | None], None], speculation: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft_always(monkeypatch)
    with FusionRuntime.load(bundles[0], "fp32", "cpu", speculation=speculation) as rt:
        clean = [rt.generate(PROMPT, 6, **options) for options in OPTIONS]
        expert = clean[0].experts[0]
        for options, expected in zip(OPTIONS, clean, strict=True):
            fault(wrong_routing(value))
            error = failing(lambda options=options: rt.generate(PROMPT, 6, **options))  # type: ignore[misc]
            assert str(error) == sentence("routing scores of router", "fp32") and error.model == "router"
            for model in ("router", expert):
                fault(wrong_logits(model, value))
                error = failing(lambda options=options: rt.generate(PROMPT, 6, **options))  # type: ignore[misc]
                assert str(error) == sentence(f"logits of {model}", "fp32") and error.model == model
            fault(None)
            after = rt.generate(PROMPT, 6, **options)
            assert (speculation == "auto" and "seed" in options) or after.token_ids == expected.token_ids  # drafts are random here


def test_a_token_that_is_masked_with_minus_infinity_is_no_fault(bundles: list[Path], fault: Callable[[Fault | None], None]) -> None:
    with FusionRuntime.load(bundles[0], "fp32", "cpu") as rt:
        best = rt.generate(PROMPT, 1).token_ids[0]

        def masked(name: str, output: Output) -> Output:
            logits = np.array(output.logits)
            logits[:, best] = -np.inf
            return output._replace(logits=logits)

        fault(masked)
        assert rt.generate(PROMPT, 1).token_ids[0] != best


def test_scores_that_are_not_finite_are_refused_at_their_position(bundles: list[Path], fault: Callable[[Fault | None], None]) -> None:
    with FusionRuntime.load(bundles[0], "fp32", "cpu") as rt:
        experts = rt.score(PROMPT).experts
        expert = rt.expert_names[experts[20]]
        first = int(np.flatnonzero(experts == experts[20])[0])
        fault(wrong_logits(expert, np.nan))
        assert str(failing(lambda: rt.score(PROMPT))) == sentence(f"logits of {expert}", "fp32", first)
        fault(wrong_routing(np.inf))
        assert str(failing(lambda: rt.score(PROMPT, positions=[30, 4]))) == sentence("routing scores of router", "fp32", 4)


def test_a_penalty_beyond_float32_is_the_callers_fault(rt: FusionRuntime) -> None:
    with pytest.raises(InputError, match="A penalty, logit_bias or temperature takes the logits beyond what float32 holds"):
        rt.generate(PROMPT, 4, repetition_penalty=1e-39)


def poison(session: Session, model: int | None, begin: int = 0) -> None:
    """NaN in the keys and values of a model, None for the router, from a position on."""
    readers = session._decoder.readers
    cache: Any = (readers.router if model is None else readers.experts[model]).cache
    memory = cache.memory
    memory.buffers[..., begin:, :] = np.nan


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("exact", [False, True])
def test_nan_in_a_cache_is_noticed_once_and_does_not_stay(bundles: list[Path], number: int, exact: bool) -> None:
    with FusionRuntime.load(bundles[number], "fp32", "cpu") as rt:
        clean, session = rt.session(), rt.session()
        for each in (clean, session):
            each.append(PROMPT)
        first = clean.step()
        assert session.step().id == first.id
        assert session.lags[first.expert] == 1
        second = clean.step()
        for model in (None, rt.expert_names.index(second.expert)):
            poison(session, model)
            error = failing(session.step)
            assert error.model == ("router" if model is None else second.expert)
            assert session.token_ids == [*PROMPT, first.id]
            with pytest.raises(InputError, match="There are no logits"):
                _ = session.logits
            token = session.step()
            assert (token.id, token.expert) == (second.id, second.expert)
            session.rewind(len(PROMPT) + 1)


def test_nan_behind_the_text_is_never_read(bundles: list[Path]) -> None:
    for folder in bundles:
        with FusionRuntime.load(folder, "fp32", "cpu") as rt:
            session, clean = rt.session(), rt.session()
            for each in (session, clean):
                each.append(PROMPT)
                each.step()
            for model in (None, *range(len(rt.expert_names))):
                poison(session, model, len(PROMPT))
            assert [session.step().id for _ in range(8)] == [clean.step().id for _ in range(8)]


def test_what_others_have_read_is_not_borrowed_again_after_a_fault(bundles: list[Path]) -> None:
    with FusionRuntime.load(bundles[0], "fp32", "cpu") as rt:
        lender, borrower = rt.session(), rt.session()
        lender.append(PROMPT)
        first = lender.step()
        poison(lender, None)
        borrower.append([*PROMPT, 50, 51])
        assert failing(borrower.step).model == "router"
        borrower.step()
        other = rt.session()
        other.append(PROMPT)
        assert other.step().id == first.id


def test_finished_texts_are_not_kept_after_a_fault(bundles: list[Path]) -> None:
    with FusionRuntime.load(bundles[0], "fp32", "cpu", prefix_cache=3) as rt:
        expected = rt.generate([*PROMPT, 60], 3)
        for end in (61, 62, 63):
            rt.generate([*PROMPT, end], 3)
        for decoder in rt._sets.current.pool.idle:
            decoder.readers.router.cache.memory.buffers[...] = np.nan  # type: ignore[attr-defined]
        assert failing(lambda: rt.generate([*PROMPT, 60], 3)).model == "router"
        assert rt.generate([*PROMPT, 60], 3).token_ids == expected.token_ids


@pytest.mark.parametrize("number", [0, 2])
def test_the_router_answers_for_an_expert_that_fails(bundles: list[Path], number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(LOG, "warning", lambda text, *values: warnings.append(text % values))
    with FusionRuntime.load(bundles[number], "fp32", "cpu", on_expert_failure="router_only", prefix_cache=0) as rt:
        session, reference = rt.session(), rt.session()
        session.append(PROMPT)
        failed = session.step().expert
        poison(session, rt.expert_names.index(failed))
        answered = []
        for _ in range(16):
            reference.rewind(0)
            reference.append(session.token_ids)
            expected = reference.step()
            if expected.expert == failed:
                reference.rewind(len(session))
                expected = reference.step(lam=1.0, fusion="weighted")
                answered.append(failed)
            token = session.step()
            assert (token.id, token.expert) == (expected.id, "router" if expected.expert == failed else expected.expert)
            assert token.logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert answered and len(warnings) == 1
        assert warnings[0].startswith(f"{failed} failed, and the router answers alone: The logits of {failed} in fp32 hold NaN")
        session.rewind(len(PROMPT))
        assert session.step().expert == failed, "a rewind asks it again"


@pytest.mark.parametrize("speculation", ["off", "auto"])
def test_the_router_answers_for_an_expert_whose_device_fails(
    bundles: list[Path], speculation: str, monkeypatch: pytest.MonkeyPatch, fault: Callable[[Fault | None], None]
) -> None:
    draft_always(monkeypatch)

    def broken(name: str, output: Output) -> Output:
        if name != "router":
            raise FusionError(f"ONNX Runtime failed on {name}.")
        return output

    with FusionRuntime.load(bundles[0], "fp32", "cpu", on_expert_failure="router_only", speculation=speculation) as rt:
        expected = rt.generate(PROMPT, 8, lam=1.0, fusion="weighted")
        pinned = rt.generate(PROMPT, 3, lam=0.0, expert=rt.expert_names[0])
        fault(broken)
        alone = rt.generate(PROMPT, 8)
        assert alone.token_ids == expected.token_ids and set(alone.experts) == {"router"}
        assert rt.generate(PROMPT, 3, lam=0.0, expert=rt.expert_names[0]).token_ids == expected.token_ids[:3]
        fault(None)
        assert rt.generate(PROMPT, 3, lam=0.0, expert=rt.expert_names[0]).token_ids == pinned.token_ids
    with FusionRuntime.load(bundles[0], "fp32", "cpu", speculation=speculation) as rt:
        fault(broken)
        with pytest.raises(FusionError, match="ONNX Runtime failed on"):
            rt.generate(PROMPT, 8)


def test_a_router_that_fails_is_never_replaced(bundles: list[Path], fault: Callable[[Fault | None], None]) -> None:
    with FusionRuntime.load(bundles[0], "fp32", "cpu", on_expert_failure="router_only") as rt:
        fault(wrong_logits("router", np.nan))
        assert failing(lambda: rt.generate(PROMPT, 2)).model == "router"
