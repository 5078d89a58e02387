"""The quick fusion for one candidate, held against the fusion graph and against plain float64."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.backend import Fused, FusionInputs
from fusionroute.runtime.backends.cpu_fusion import OrtFuser
from fusionroute.runtime.backends.greedy_fusion import GreedyFuser

VOCAB = 37
rows = arrays.arrays(np.float32, (1, VOCAB), elements=st.floats(-60, 60, width=32))
temperatures = st.sampled_from([0.3, 0.7, 1.0, 1.5])
weights = st.sampled_from([(0.5, 0.5), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (0.3, 0.7)])


@settings(deadline=None)
@given(rows, rows, weights, temperatures)
def test_numbers_are_those_of_float64(
    router: np.ndarray, expert: np.ndarray, coefficients: tuple[float, float], temperature: float
) -> None:
    fused = GreedyFuser(VOCAB)(router, expert, coefficients, temperature)
    a, b = (np.float64(np.float32(weight)) for weight in coefficients)
    expected = a * router[0] + b * expert[0].astype(np.float64)
    np.testing.assert_allclose(fused.rows[0], expected, rtol=1e-6, atol=1e-5)
    assert fused.ids[0, 0] == np.flatnonzero(fused.rows[0] == fused.rows[0].max())[0]  # the lower id among equals
    assert fused.logits[0, 0] == fused.unpenalised[0, 0] == fused.rows[0].max()
    for normaliser, scaled in ((fused.log_normaliser[0], expected), (fused.sampling_normaliser[0], expected / temperature)):
        np.testing.assert_allclose(
            normaliser, scaled.max() + np.log(np.exp(scaled - scaled.max()).sum()), rtol=1e-6, atol=1e-5 / min(temperature, 1.0)
        )


@pytest.fixture(scope="module")
def rt(bundles: list[Path]) -> Iterator[FusionRuntime]:
    with FusionRuntime.load(bundles[0], "fp32") as runtime:
        yield runtime


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1), weights, temperatures)
def test_the_graph_says_the_same(rt: FusionRuntime, seed: int, coefficients: tuple[float, float], temperature: float) -> None:
    """Rows bit for bit: speculation compares tokens that came through either."""
    router, expert = 9 * np.random.default_rng(seed).standard_normal((2, 1, rt.vocab_size)).astype(np.float32)
    fuse = rt.backend.fuser()
    fused = fuse(FusionInputs(router, expert, coefficients, temperature=temperature))
    quick = [np.copy(getattr(fused, name)) for name in Fused._fields]
    # two candidates: it has to sort
    graph = fuse(FusionInputs(router, expert, coefficients, 2, temperature=temperature))
    assert np.array_equal(quick[5], graph.rows)
    assert quick[0][0, 0] == graph.ids[0, 0]
    assert quick[1][0, 0] == graph.logits[0, 0]
    np.testing.assert_allclose(
        [quick[3][0], quick[4][0]], [graph.log_normaliser[0], graph.sampling_normaliser[0]], rtol=1e-6 / min(temperature, 1.0)
    )


def test_one_candidate_without_a_penalty_takes_it(rt: FusionRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """A penalty and several candidates go through the graph."""
    taken: list[int] = []
    quick = GreedyFuser.__call__

    def counted(self: GreedyFuser, *arguments: Any) -> Fused:
        taken.append(1)
        return quick(self, *arguments)

    monkeypatch.setattr(GreedyFuser, "__call__", counted)
    assert isinstance(rt.backend.fuser(), OrtFuser)
    session = rt.session()
    session.append([5, 6, 7])
    session.step()
    assert len(taken) == 1
    session.step(repetition_penalty=1.3)
    session.step(temperature=1.0, seed=0)
    assert len(taken) == 1
    session.step(temperature=0.7, top_k=1, seed=0)
    assert len(taken) == 2
    session.step()
    logits = session.logits
    before = logits.copy()
    session.step()
    assert len(taken) == 4
    assert np.array_equal(logits, before)
    assert not np.array_equal(logits, session.logits)
