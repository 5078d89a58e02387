"""Streaming statistics against numpy on the raw values, and ranges against brute force."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionroute.calibration.observers import BINS, LEVELS, SMALLEST, Observer
from fusionroute.runtime.errors import InputError


def values(kind: str, rows: int, channels: int, seed: int = 0) -> np.ndarray:
    """Activations as they come: even, long-tailed, or with a few channels that stick out."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, channels))
    if kind == "heavy":
        x = rng.standard_t(3, (rows, channels))
    if kind == "outliers":
        x[:, ::7] *= 40
    return x.astype(np.float32)


def seen(x: np.ndarray, cuts: list[int] | None = None) -> Observer:
    observer = Observer("m", x.shape[-1])
    for piece in np.split(x, sorted(cuts or [])):
        observer.see(piece)
    return observer


def error(x: np.ndarray, clip: float) -> float:
    """Summed squared error of symmetric 8 bit with the range `clip`."""
    step = clip / LEVELS
    return float(np.square(np.clip(np.rint(x.astype(np.float64) / step), -LEVELS, LEVELS) * step - x).sum())


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_statistics_do_not_depend_on_how_the_rows_are_cut(data: st.DataObject) -> None:
    rows, channels = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 9))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    largest = data.draw(st.integers(-44, 30))
    x = (rng.standard_normal((rows, channels)) * 10.0 ** rng.integers(-45, largest, (rows, 1))).astype(
        np.float32
    )  # zeros and denormals too
    cuts = data.draw(st.lists(st.integers(0, rows), max_size=6))
    whole, pieces = seen(x), seen(x, cuts)
    cut = data.draw(st.integers(0, rows))
    added, second = seen(x[:cut]), seen(x[cut:])
    added.add(second)
    np.testing.assert_array_equal(added.counts, whole.counts)
    np.testing.assert_array_equal(added.channel_absmax, whole.channel_absmax)
    np.testing.assert_allclose(added.channel_sum, whole.channel_sum, rtol=1e-12)
    np.testing.assert_array_equal(whole.counts, pieces.counts)
    np.testing.assert_array_equal(whole.channel_absmax, pieces.channel_absmax)
    np.testing.assert_allclose(whole.channel_sum, pieces.channel_sum, rtol=1e-12)
    for one in (whole, pieces, added):
        assert (one.rows, one.minimum, one.maximum) == (rows, x.min(), x.max())
        np.testing.assert_array_equal(one.channel_absmax, np.abs(x).max(0))
        np.testing.assert_allclose(one.mean_square, np.square(x.astype(np.float64)).mean(0), rtol=1e-12)
        top = max(math.frexp(float(np.abs(x).max()))[1], SMALLEST) if x.any() else SMALLEST
        assert one.limit == 2.0**top
        expected = np.histogram(np.abs(x).astype(np.float64), BINS, (0, one.limit))[0]
        np.testing.assert_array_equal(one.counts, expected)


def test_rows_of_several_dimensions_and_none() -> None:
    x = values("even", 12, 5)
    observer = Observer("m", 5)
    observer.see(x.reshape(3, 4, 5))
    observer.see(x[:0])
    assert observer.rows == 12
    np.testing.assert_array_equal(observer.counts, seen(x).counts)


def test_before_the_first_row_every_range_is_zero() -> None:
    for observer in (Observer("m", 3), seen(np.zeros((4, 3), np.float32))):
        assert observer.absmax() == observer.percentile(99.9) == observer.mse() == observer.entropy() == 0
        assert not observer.mean_square.any()


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_whole(wrong: float) -> None:
    x = values("even", 6, 4)
    observer = seen(x)
    bad = values("heavy", 6, 4)
    bad[3, 2] = wrong
    with pytest.raises(InputError, match=r"activations that enter m are not all finite: expected numbers; check") as caught:
        observer.see(bad)
    assert "\n" not in str(caught.value)
    assert observer.rows == 6
    np.testing.assert_array_equal(observer.counts, seen(x).counts)


@pytest.mark.parametrize("kind", ["even", "heavy", "outliers"])
@pytest.mark.parametrize("p", [0.0, 10.0, 50.0, 99.0, 99.99, 100.0])
def test_percentile(kind: str, p: float) -> None:
    x = values(kind, 300, 14)
    observer = seen(x, [100, 101])
    exact = np.percentile(np.abs(x), p)
    # numpy takes a value between two that it has
    neighbours = np.diff(np.sort(np.abs(x), axis=None))[-5:].max() if p > 99 else 0
    assert abs(observer.percentile(p) - exact) <= observer.limit / BINS + neighbours
    assert observer.percentile(100) == np.abs(x).max() == observer.absmax()


@pytest.mark.parametrize("p", [-1, 100.1, math.nan])
def test_percentiles_out_of_range(p: float) -> None:
    with pytest.raises(InputError, match=r"percentile .* is out of range: expected 0 to 100"):
        seen(values("even", 3, 3)).percentile(p)


@pytest.mark.parametrize("kind", ["even", "heavy", "outliers"])
@pytest.mark.parametrize("seed", range(3))
def test_mse_is_as_good_as_the_best_range_on_the_raw_values(kind: str, seed: int) -> None:
    x = values(kind, 4000, 14, seed)
    observer = seen(x)
    best = min(error(x, clip) for clip in np.linspace(0.02, 1, 99) * observer.absmax())
    assert error(x, observer.mse()) <= 1.03 * best
    if kind == "heavy":
        assert best < 0.9 * error(x, observer.absmax()), "else the test would not tell the two apart"


@pytest.mark.parametrize("kind", ["even", "heavy", "outliers"])
@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_the_expected_error_of_a_range(kind: str, share: float) -> None:
    x = values(kind, 4000, 14)
    observer = seen(x)
    limit = share * observer.absmax()
    assert observer.error(limit) == pytest.approx(error(x, limit) / x.size, rel=0.03)


def test_the_expected_error_of_one_value_is_that_of_many_equal_ones() -> None:
    one, many = (seen(np.full((count, 1), 0.3, np.float32)).error(0.2) for count in (1, 50))
    assert one == pytest.approx(many) == pytest.approx(0.1**2, rel=0.02)


def migacz(counts: np.ndarray) -> int:
    """The number of bins with the smallest divergence, as the slides of GTC 2017 describe it, bin by bin."""
    divergences = {}
    for i in range(LEVELS + 1, len(counts) + 1):
        p = counts[:i].astype(np.float64)
        p[-1] += counts[i:].sum()
        q = np.zeros(i)
        level = np.arange(i) * (LEVELS + 1) // i
        for which in range(LEVELS + 1):
            mine = (level == which) & (counts[:i] > 0)
            if mine.any():
                q[mine] = counts[:i][level == which].sum() / mine.sum()
        p, q = p / p.sum(), q / max(q.sum(), 1)
        with np.errstate(divide="ignore"):
            divergences[i] = float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())
    return min(divergences, key=lambda i: divergences[i])


@pytest.mark.parametrize("kind", ["even", "heavy", "outliers"])
def test_entropy_against_the_procedure_written_out(kind: str) -> None:
    observer = seen(values(kind, 900, 14) / np.float32(3))
    used = np.flatnonzero(observer.counts)[-1] + 1
    i = migacz(observer.counts[:used])
    assert observer.entropy() == pytest.approx(min((i - 0.5) * observer.limit / BINS, observer.absmax()))
    if kind == "heavy":
        assert observer.entropy() < 0.9 * observer.absmax(), "else nothing was clipped and the test would say little"


@pytest.mark.parametrize("kind", ["even", "outliers", "nothing"])
def test_on_disk_and_back(kind: str) -> None:
    x = values(kind, 0 if kind == "nothing" else 50, 6)
    observer = seen(x, [20])
    again = Observer.of("m", observer.tensors())
    for one in (observer, again):
        one.see(values("heavy", 5, 6))
    assert vars(again).keys() == vars(observer).keys()
    for name, value in vars(observer).items():
        np.testing.assert_array_equal(vars(again)[name], value)


def test_statistics_that_do_not_fit_together() -> None:
    good = seen(values("even", 50, 6)).tensors()
    for name, change in {
        "numbers": good["numbers"][:3],
        "absmax": good["absmax"][:5],
        "squares": -good["squares"],
        "counts": good["counts"][100:],
    }.items():
        with pytest.raises(InputError, match="The statistics of m do not fit together"):
            Observer.of("m", good | {name: change})
    with pytest.raises(InputError, match="The statistics of m"):
        Observer.of("m", {})
