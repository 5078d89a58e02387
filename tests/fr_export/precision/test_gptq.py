"""GPTQ against the textbook: one channel at a time with the whole inverse Hessian, in double precision."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionroute.fr_export.precision import gptq, int4, int8
from fusionroute.fr_export.precision.blockwise import Format, Quantised, blocked, nearest

FORMS = {"int8": int8.FORMAT, "int4": int4.FORMAT}


def widen(part: Quantised, width: int) -> np.ndarray:
    zero = 128.0 if part.zeros is None else part.zeros[..., None].astype(np.float64)
    return ((part.values - zero) * part.scales.astype(np.float64)[..., None]).reshape(len(part.values), -1)[:, :width]


def correlated(count: int, channels: int, seed: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    mixed = draw.standard_normal((count, channels)) @ draw.standard_normal((channels, channels))
    return (mixed * draw.lognormal(0, 1, channels)).astype(np.float32)


def known(inputs: np.ndarray) -> gptq.Hessian:
    hessian = gptq.Hessian(inputs.shape[1])
    for start in range(0, len(inputs), 7):
        hessian.see(inputs[start : start + 7])
    return hessian


def textbook(weights: np.ndarray, inputs: np.ndarray, fmt: Format) -> np.ndarray:
    """Optimal brain quantisation in a fixed order (arXiv:2210.17323, equations 2 and 3): round a channel, let all
    others make up for it, and take the channel out of the inverse Hessian.
    """
    hessian = inputs.astype(np.float64).T @ inputs
    importance = np.diag(hessian).copy()
    hessian += gptq.DAMPING * importance.mean() * np.eye(len(hessian))
    scales, zeros = fmt.grid(blocked(weights, fmt.block), blocked(importance[None].astype(np.float32), fmt.block)[0])
    step = np.repeat(scales.astype(np.float64), fmt.block, axis=1)
    zero = np.repeat(np.full(scales.shape, 128.0) if zeros is None else zeros.astype(np.float64), fmt.block, axis=1)
    left, rounded = weights.astype(np.float64), np.zeros(weights.shape)
    open_channels = list(np.argsort(-importance, kind="stable"))
    while open_channels:
        channel = open_channels[0]
        inverse = np.linalg.inv(hessian[np.ix_(open_channels, open_channels)])
        level = np.clip(np.rint(left[:, channel] / step[:, channel]) + zero[:, channel], 0, 2**fmt.bits - 1)
        rounded[:, channel] = (level - zero[:, channel]) * step[:, channel]
        error = (left[:, channel] - rounded[:, channel]) / inverse[0, 0]
        left[:, open_channels] -= np.outer(error, inverse[0])
        open_channels.pop(0)
    return rounded


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("channels", [64, 150, 200])
def test_it_is_optimal_brain_quantisation_in_a_fixed_order(name: str, channels: int) -> None:
    fmt = FORMS[name]
    weights = np.random.default_rng(0).standard_normal((12, channels)).astype(np.float32)
    inputs = correlated(4 * channels, channels, 1)
    expected = textbook(weights, inputs, fmt)
    quantised = widen(gptq.quantise(weights, known(inputs).factor(), fmt), channels)
    # single precision may round a value that lies between two levels the other way, and what follows it differs
    assert (np.abs(quantised - expected) < 1e-6 + 1e-5 * np.abs(expected)).mean() > 0.99
    lost = [np.square((weights - each) @ inputs.T).sum() for each in (quantised, expected, widen(nearest(weights, fmt), channels))]
    assert lost[0] == pytest.approx(lost[1], rel=0.002)
    assert lost[0] < 0.3 * lost[2]


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    rows=st.integers(1, 5),
    channels=st.integers(1, 140),
    inputs=st.integers(0, 200),
    name=st.sampled_from(list(FORMS)),
    seed=st.integers(0, 99),
)
def test_any_shape_and_any_number_of_inputs(rows: int, channels: int, inputs: int, name: str, seed: int) -> None:
    fmt = FORMS[name]
    draw = np.random.default_rng(seed)
    weights = draw.standard_normal((rows, channels)).astype(np.float32)
    seen = correlated(inputs, channels, seed)
    seen[:, draw.random(channels) < 0.2] = 0  # channels that are always zero
    quantised = gptq.quantise(weights, known(seen).factor(), fmt)
    blocks = -(-channels // fmt.block)
    assert quantised.values.shape == (rows, blocks, fmt.block) and quantised.scales.shape == (rows, blocks)
    zeros = np.full((rows, blocks), 128) if quantised.zeros is None else quantised.zeros
    padding = quantised.values.reshape(rows, -1)[:, channels:]
    assert (padding == np.repeat(zeros, fmt.block, axis=1)[:, channels:]).all()
    assert quantised.values.max() <= 2**fmt.bits - 1
    halves = [gptq.quantise(part, known(seen).factor(), fmt) for part in (weights[: rows // 2], weights[rows // 2 :]) if len(part)]
    joined = np.concatenate([half.values for half in halves])
    # a row does not depend on the others, but for the last bit of sums
    assert (joined == quantised.values).mean() > 0.99


@pytest.mark.parametrize("name", FORMS)
def test_without_inputs_it_rounds_to_nearest(name: str) -> None:
    fmt = FORMS[name]
    weights = np.random.default_rng(0).standard_normal((9, 100)).astype(np.float32)
    quantised, expected = gptq.quantise(weights, gptq.Hessian(100).factor(), fmt), nearest(weights, fmt)
    assert np.array_equal(quantised.values, expected.values) and np.array_equal(quantised.scales, expected.scales)


def test_inputs_all_alike_are_damped_until_they_factor() -> None:
    hessian = gptq.Hessian(96)
    hessian.see(np.full((5, 96), 1e12, np.float32))
    factor = hessian.factor()
    assert torch.isfinite(factor.shares).all()


@pytest.mark.parametrize("channels", [5, 150])
def test_the_root_of_a_sum_is_of_the_damped_sum(channels: int) -> None:
    inputs = correlated(4 * channels, channels, 3)
    root = known(inputs).root().double().numpy()
    total = inputs.T.astype(np.float64) @ inputs
    damped = total + gptq.DAMPING * np.diag(total).mean() * np.eye(channels)
    np.testing.assert_allclose(root @ root.T, damped, rtol=1e-4, atol=1e-5 * damped.max())
    assert np.array_equal(root, np.tril(root))
    nothing = gptq.Hessian(channels).root().numpy()
    np.testing.assert_allclose(
        nothing, np.sqrt(gptq.DAMPING) * np.eye(channels), rtol=1e-6, err_msg="without inputs all channels count alike"
    )


def test_ranges_are_clipped_where_important_channels_want_it() -> None:
    row = np.full((1, 32), 0.1, np.float32)
    row[0, :16], row[0, 31] = -0.1, 3.0
    weighted = np.ones((1, 32), np.float32)
    weighted[0, 31] = 1e-6  # the outlier does not matter
    plain, clipped = (int4.grid(blocked(row, 32), importance)[0].astype(float)[0, 0] for importance in (None, weighted))
    assert clipped < plain
