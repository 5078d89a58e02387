"""The compiled loops of rounding against numpy, in double precision where they sum."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionroute.fr_export.precision import int4, int8
from fusionroute.fr_export.precision.blockwise import Format, nearest
from fusionroute.fr_export.precision.kernels import RUN, extremes, round_channels

SEEDS = st.integers(0, 999)


def drawn(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Values of very different sizes, and some blocks of zeros. It may not be written to, as a mapped file may not."""
    draw = np.random.default_rng(seed)
    values = draw.standard_normal(shape) * draw.lognormal(0, 2, (*shape[:-1], 1)) * (draw.random((*shape[:-1], 1)) < 0.9)
    values = values.astype(np.float32)
    values.flags.writeable = False
    return values


@settings(deadline=None, derandomize=True, max_examples=30)
@given(rows=st.integers(1, 9), blocks=st.integers(1, 5), block=st.sampled_from([1, 7, 32, 64, 128]), seed=SEEDS)
def test_the_range_of_a_block_holds_zero(rows: int, blocks: int, block: int, seed: int) -> None:
    values = drawn((rows, blocks, block), seed)
    low, high = extremes(values)
    assert np.array_equal(low, np.minimum(values.min(-1), 0)) and np.array_equal(high, np.maximum(values.max(-1), 0))


@settings(deadline=None, derandomize=True, max_examples=30)
@given(rows=st.integers(1, 9), blocks=st.integers(1, 5), weighted=st.booleans(), seed=SEEDS)
def test_no_share_of_a_range_has_a_smaller_error_than_the_one_that_int4_takes(rows: int, blocks: int, weighted: bool, seed: int) -> None:
    values = drawn((rows, blocks, 64), seed)
    importance = np.random.default_rng(seed).lognormal(0, 2, (blocks, 64)).astype(np.float32) if weighted else None
    scales, zeros = int4.grid(values, importance)
    weights, exact = 1.0 if importance is None else importance.astype(np.float64), values.astype(np.float64)

    def error(scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
        step, middle = scale.astype(np.float64)[..., None], zero.astype(np.float64)[..., None]
        level = np.clip(np.rint(exact / np.where(step > 0, step, np.inf)) + middle, 0, 15)
        return np.asarray((weights * ((level - middle) * step - exact) ** 2).sum(-1))

    low, high = np.minimum(values.min(-1), 0), np.maximum(values.max(-1), 0)
    candidates = []
    for share in int4.CLIPS:
        scale = ((high - low) * np.float32(share / 15)).astype(np.float16)
        step = np.where(scale > 0, scale.astype(np.float32), np.inf)
        candidates.append((scale, np.clip(np.rint(-low * np.float32(share) / step), 0, 15).astype(np.uint8)))
    least = np.min([error(*candidate) for candidate in candidates], axis=0)
    assert (error(scales, zeros) <= least * (1 + 1e-4) + 1e-12).all()
    assert all(any(scales[at] == scale[at] and zeros[at] == zero[at] for scale, zero in candidates) for at in np.ndindex(scales.shape))


@pytest.mark.parametrize("fmt", [int4.FORMAT, int4.FINE, int8.FORMAT, int8.SMALL])
@pytest.mark.parametrize(("rows", "channels"), [(1, 1), (5, 64), (3, 200), (300, 70)])
def test_every_weight_goes_to_its_nearest_level(fmt: Format, rows: int, channels: int) -> None:
    values = drawn((rows, channels), rows)
    levels, scales, zeros = nearest(values, fmt)
    step = np.repeat(scales.astype(np.float32), fmt.block, axis=1)[:, :channels]
    zero = np.full(scales.shape, fmt.middle) if zeros is None else zeros
    zero = np.repeat(zero.astype(np.float32), fmt.block, axis=1)
    inverse = np.divide(1, step, out=np.zeros_like(step), where=step > 0)
    expected = np.clip(np.rint(values * inverse) + zero[:, :channels], 0, 2**fmt.bits - 1)
    assert levels.dtype == np.uint8 and np.array_equal(levels.reshape(rows, -1)[:, :channels], expected)
    assert np.array_equal(levels.reshape(rows, -1)[:, channels:], zero[:, channels:]), "padding stands for 0"


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    channels=st.integers(1, 24), rows=st.sampled_from([1, 2, RUN - 1, RUN, RUN + 1, 2 * RUN + 5]), bits=st.sampled_from([4, 8]), seed=SEEDS
)
def test_each_channel_makes_up_for_those_before_it(channels: int, rows: int, bits: int, seed: int) -> None:
    """Shares and weights are multiples of powers of two, so that every order of the sums gives the same."""
    draw = np.random.default_rng(seed)
    weights = (draw.integers(-64, 64, (channels, rows)) / 16).astype(np.float32)
    carried = (draw.integers(-16, 16, (channels, rows)) / 64).astype(np.float32)  # for errors of earlier channels
    shares = np.triu(draw.integers(-4, 4, (channels + 3, channels + 3)) / 8).astype(np.float32)
    blocks, top = draw.integers(0, 3, channels), 2**bits - 1
    steps = draw.choice([0.0, 0.25, 0.5], (3, rows)).astype(np.float32)
    zeros = draw.integers(0, top + 1, (3, rows)).astype(np.float32)
    errors, levels = np.empty((channels, rows), np.float32), np.empty((channels, rows), np.uint8)
    round_channels(weights, weights + carried, shares[:channels, :channels], blocks, steps, zeros, top, errors, levels)
    expected = np.zeros((channels, rows))
    for channel in range(channels):
        value = weights[channel] + carried[channel] + shares[:channel, channel].astype(np.float64) @ expected[:channel]
        step, zero = steps[blocks[channel]].astype(np.float64), zeros[blocks[channel]]
        level = np.clip(np.rint(np.divide(value, step, out=np.zeros(rows), where=step > 0)) + zero, 0, top)
        assert np.array_equal(levels[channel], level)
        expected[channel] = weights[channel] - (level - zero) * step
    assert np.array_equal(errors, expected)
