"""Models that share a head: it runs once for a token, on fused hidden states, and gives what fusing their logits gives."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.backend import NO_IDS, FusionInputs, Segment, room_for
from fusionroute.runtime.backends.cpu_fusion import OrtFuser
from fusionroute.runtime.backends.hidden_rows import Head, HiddenRows
from fusionroute.runtime.backends.pair_fusion import PairFuser
from tests.support.pair_backend import pair_of

IDS: list[int] = np.random.default_rng(3).integers(3, 290, 24).tolist()
ROUNDING = {"fp32": 1e-5, "int8": 0.02}  # of the largest logit: in int8 the head rounds its input to 8 bits


@pytest.fixture(scope="module", params=ROUNDING)
def rt(request: pytest.FixtureRequest, shared: Path) -> Iterator[FusionRuntime]:
    with FusionRuntime.load(shared, request.param, "cpu") as runtime:
        yield runtime


def states(rt: FusionRuntime, count: int) -> tuple[HiddenRows, HiddenRows]:
    """What the router and an expert answer at the last `count` positions, in arrays of their own."""
    backend, segment = pair_of(rt), Segment(IDS, range(len(IDS) - count, len(IDS)))
    router, expert = backend.forward_both(backend.router.cache(), segment, backend.experts[1].cache(), segment)
    return copied(router.logits), copied(expert.logits)


def copied(rows: HiddenRows) -> HiddenRows:
    """Rows that later passes do not change."""
    return HiddenRows(rows.states.copy(), rows.head)


def logits_of(rows: HiddenRows) -> np.ndarray:
    """Each row through the head of its own, float64 [K, V]."""
    return np.concatenate([np.asarray(rows[place : place + 1]) for place in range(len(rows))]).astype(float)


def fuser(rt: FusionRuntime, linear: bool = True, exact: bool = False) -> PairFuser:
    """As the backend makes it, but for a head that is said to cap its logits, or an exact runtime."""
    backend = pair_of(rt)
    assert backend._head is not None
    return PairFuser(OrtFuser(backend._fusion, rt.vocab_size), backend._head, linear, exact)


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("coefficients", [(0.3, 0.7), (1.0, 0.0), (0.0, 1.0), (0.5, 1.5)])
@pytest.mark.parametrize(("count", "k", "penalty"), [(1, 1, 1.0), (1, 5, 1.3), (4, 7, 1.3)])
def test_fused_states_have_the_fused_logits(
    rt: FusionRuntime, linear: bool, coefficients: tuple[float, float], count: int, k: int, penalty: float
) -> None:
    """Against the weighted sum of both models' logits in double precision, and the definition of the penalty."""
    router, expert = states(rt, count)
    expected = coefficients[0] * logits_of(router) + coefficients[1] * logits_of(expert)
    normaliser = np.log(np.exp(expected).sum(-1))
    ids = np.array([3, 8, 40], np.int64) if penalty > 1 else NO_IDS
    fused = fuser(rt, linear)(FusionInputs(router, expert, coefficients, k, ids, penalty, 0.8))
    expected[:, ids] = np.where(expected[:, ids] > 0, expected[:, ids] / penalty, expected[:, ids] * penalty)
    bound = ROUNDING[rt.precision] * np.abs(expected).max()
    assert np.abs(fused.rows - expected).max() <= bound
    assert np.abs(fused.log_normaliser - normaliser).max() <= bound
    best = np.take_along_axis(expected, fused.ids, -1)
    assert fused.ids.shape == (count, k) and np.abs(best - np.sort(expected, -1)[:, : -k - 1 : -1]).max() <= 2 * bound


@pytest.mark.parametrize("linear", [True, False])
def test_rows_fused_ahead_are_those_fused_one_by_one(rt: FusionRuntime, linear: bool) -> None:
    """Bit for bit where the runtime is exact, for odd numbers of rows too."""
    for count in (1, 2, 5):
        router, expert = states(rt, count)
        fuse = fuser(rt, linear, exact=True)
        ahead, other, coefficients = fuse.ahead(router, expert, (0.4, 0.6))
        for place in range(count):
            own = slice(place, place + 1)
            single = fuse(FusionInputs(router[own], expert[own], (0.4, 0.6), 3)).rows.copy()
            assert np.array_equal(fuse(FusionInputs(ahead[own], other[own], coefficients, 3)).rows, single)


def test_the_head_runs_once_for_a_token_and_on_one_row(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever expert was guessed; and for no token of a prompt but the last."""
    runs: list[Head] = []
    run = Head.run

    def counted(head: Head, binding: Any) -> None:
        runs.append(head)
        run(head, binding)

    monkeypatch.setattr(Head, "run", counted)
    with FusionRuntime.load(shared, "int8", "cpu") as rt:
        assert pair_of(rt)._linear
        session = rt.session()
        session.append(IDS)
        experts = [session.step().expert for _ in range(24)]
    assert len(set(experts)) > 1, "a guess was wrong"
    assert len(runs) == 24


def test_rows_of_several_passes_are_kept(rt: FusionRuntime) -> None:
    """The router's drafts are."""
    router, expert = states(rt, 2)
    rows = room_for(router, 3, rt.vocab_size)
    rows[0:2], rows[2:3] = router, expert[1:2]
    assert np.array_equal(rows.states, np.concatenate([router.states, expert.states[1:]]))
    assert np.array_equal(np.asarray(rows[2:3]), np.asarray(expert[1:2]))
