"""Background prefill bounds what an expert chosen late has to read; its timing does not change the result."""

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from fusionroute.runtime import ClosedError, FusionError, FusionRuntime, InputError
from fusionroute.runtime.backends.ort_cpu import OrtCache
from fusionroute.runtime.limits import PIECE, boundary

PROMPT = [5 + number % 80 for number in range(150)]


class Whim:
    """An executor without a thread: it runs what was submitted when it likes to, which may be never."""

    def __init__(self, seed: int, eager: float):
        self._random, self._eager = random.Random(seed), eager
        self._waiting: list[tuple[Future[None], Callable[..., None], tuple[Any, ...]]] = []

    def submit(self, work: Callable[..., None], *arguments: Any) -> "Future[None]":
        future: Future[None] = Future()
        self._waiting.append((future, work, arguments))
        return future

    def act(self) -> None:
        while self._waiting and self._random.random() < self._eager:
            future, work, arguments = self._waiting.pop(self._random.randrange(len(self._waiting)))
            if future.set_running_or_notify_cancel():
                work(*arguments)
                future.set_result(None)

    def shutdown(self, **_: Any) -> None:
        self._waiting.clear()


@pytest.fixture(scope="module", params=["int8", "fp32"])
def rt(request: pytest.FixtureRequest, bundles: list[Path]) -> Iterator[FusionRuntime]:
    with FusionRuntime.load(bundles[0], request.param, catch_up="background", prefix_cache=0) as runtime:
        yield runtime


def texts(rt: FusionRuntime, whim: Whim | None) -> list[tuple[int, str, float]]:
    """A text whose expert is pinned in turns, so that the others fall behind and wake."""
    session = rt.session()
    if whim is not None:
        assert session._decoder.readers._background is not None
        session._decoder.readers._background._thread = whim  # type: ignore[assignment]
    session.append(PROMPT)
    tokens = []
    for number in range(150):
        session._pinned = int(len(session) % PIECE < 2)  # wakes where a piece ends
        token = session.step()
        tokens.append((token.id, token.expert, token.logprob))
        if whim is not None:
            whim.act()
        if number == 60:
            session.rewind(160)
    return tokens


def test_tokens_do_not_depend_on_when_it_runs(rt: FusionRuntime) -> None:
    expected = texts(rt, Whim(0, 0.0))
    assert {expert for _, expert, _ in expected} == set(rt.expert_names[:2])
    for seed, eager in ((1, 0.3), (2, 0.7), (3, 1.0)):
        assert texts(rt, Whim(seed, eager)) == expected
    assert texts(rt, None) == expected


def test_exact_passes_are_even_whenever_it_runs(bundles: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[tuple[int, int]] = []
    forward = OrtCache.forward

    def recording(cache: OrtCache, ids: Any, positions: Any) -> Any:
        counts.append((len(ids), len(positions)))
        return forward(cache, ids, positions)

    monkeypatch.setattr(OrtCache, "forward", recording)
    with FusionRuntime.load(bundles[0], "int8", catch_up="background", exact=True, prefix_cache=0) as rt:
        expected = texts(rt, Whim(0, 0.0))
        for seed, eager in ((1, 0.3), (2, 1.0)):
            assert texts(rt, Whim(seed, eager)) == expected
    assert all(read % 2 == answered % 2 == 0 for read, answered in counts)


def test_no_expert_stays_far_behind(rt: FusionRuntime) -> None:
    session = rt.session(expert=rt.expert_names[0])
    session.append(PROMPT)
    session.step()
    end = time.monotonic() + 60
    while max(session.lags.values()) >= 2 * PIECE and time.monotonic() < end:
        time.sleep(0.01)
    assert max(session.lags.values()) < 2 * PIECE
    lengths = [expert.length for expert in session._decoder.readers.experts]
    assert lengths[1:] == [128] * (len(lengths) - 1)


def test_lazy_experts_stay_behind(bundles: list[Path]) -> None:
    with FusionRuntime.load(bundles[0], "fp32") as rt:
        session = rt.session(expert=rt.expert_names[0])
        session.append(PROMPT)
        session.step()
        time.sleep(0.2)
        assert session.lags[rt.expert_names[1]] == len(PROMPT) + 1


def test_passes_end_at_multiples_and_never_hold_one_token() -> None:
    for start in range(300):
        stop = boundary(start)
        assert stop % PIECE == 0 and 2 <= stop - start <= PIECE + 1


def test_an_error_is_told_when_the_expert_is_chosen(rt: FusionRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = OrtCache.forward
    second = rt.expert_names[1]

    def failing(cache: OrtCache, *arguments: Any) -> Any:
        if cache._model.model.name == second:
            raise FusionError("the second expert is broken")
        return forward(cache, *arguments)

    monkeypatch.setattr(OrtCache, "forward", failing)
    session = rt.session(expert=rt.expert_names[0])
    session.append(PROMPT)
    for _ in range(5):
        session.step()
    session._pinned = 1
    with pytest.raises(FusionError, match="second expert is broken"):
        session.step()
    session.rewind(0)


def test_closing_ends_it(bundles: list[Path]) -> None:
    rt = FusionRuntime.load(bundles[0], "int8", catch_up="background")
    session = rt.session()
    session.append(PROMPT)
    session.step()
    rt.close()
    with pytest.raises(ClosedError):
        session.step()


def test_bad_modes_are_refused(bundles: list[Path]) -> None:
    with pytest.raises(InputError, match="Unknown catch_up 'eager'"):
        FusionRuntime.load(bundles[0], catch_up="eager")
    with pytest.raises(InputError, match="prefix_cache=-1"):
        FusionRuntime.load(bundles[0], prefix_cache=-1)
