"""The compiled loops of rounding: each does in one pass over the weights what would take numpy ten."""

import numpy as np
from numba import float32, int64, uint8

from fusionroute.calibration.compiled import compiled, read

RUN = 128  # rows that `round_channels` takes at a time: their errors stay in a core's cache


def extremes(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest value of each block, 0 included: float32 [R, blocks].

    rows float32 [R, blocks, block], without NaN.
    """
    low, high = np.empty((2, *rows.shape[:2]), np.float32)
    fill_extremes(np.ascontiguousarray(rows), low, high)
    return low, high


@compiled(read(float32, 3), float32[:, ::1], float32[:, ::1])
def fill_extremes(rows: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
    """See `extremes`: low, high are filled."""
    for row in range(rows.shape[0]):
        for block in range(rows.shape[1]):
            smallest = largest = np.float32(0)
            for at in range(rows.shape[2]):
                value = rows[row, block, at]
                smallest, largest = min(smallest, value), max(largest, value)
            low[row, block], high[row, block] = smallest, largest


@compiled(
    read(float32, 3), read(float32, 2), read(float32, 3), read(float32, 3), float32, uint8[:, ::1], any_order=True,
)  # fmt: skip
def best_candidates(rows: np.ndarray, importance: np.ndarray, steps: np.ndarray, zeros: np.ndarray, top: float, best: np.ndarray) -> None:
    """For each block the first candidate whose rounding has the least squared error Σ importance·(ŵ − w)².

    rows float32 [R, blocks, block]; importance float32 [blocks, block]; steps, zeros float32 [candidates, R, blocks]: a
    weight becomes (level − zero)·step with a level from 0 to `top`. best uint8 [R, blocks] is filled.
    """
    for row in range(rows.shape[0]):
        for block in range(rows.shape[1]):
            least = np.float32(0)
            for candidate in range(len(steps)):
                step, zero = steps[candidate, row, block], zeros[candidate, row, block]
                inverse = np.float32(1) / step if step > 0 else np.float32(0)
                error = np.float32(0)
                for at in range(rows.shape[2]):
                    value = rows[row, block, at]
                    level = min(max(np.rint(value * inverse), -zero), top - zero)
                    error += importance[block, at] * (level * step - value) ** 2
                if candidate == 0 or error < least:
                    least, best[row, block] = error, candidate


@compiled(read(float32, 3), read(float32, 2), read(float32, 2), float32, uint8[:, :, ::1])
def round_to_nearest(rows: np.ndarray, steps: np.ndarray, zeros: np.ndarray, top: float, levels: np.ndarray) -> None:
    """The nearest level of every weight, from 0 to `top`: a weight becomes (level − zero)·step.

    rows float32 [R, blocks, block]; steps, zeros float32 [R, blocks]; levels uint8 [R, blocks, block] is filled.
    """
    for row in range(rows.shape[0]):
        for block in range(rows.shape[1]):
            step, zero = steps[row, block], zeros[row, block]
            inverse = np.float32(1) / step if step > 0 else np.float32(0)
            for at in range(rows.shape[2]):
                level = min(max(np.rint(rows[row, block, at] * inverse) + zero, np.float32(0)), top)
                levels[row, block, at] = np.uint8(level)


@compiled(
    read(float32, 2), read(float32, 2), read(float32, 2, "A"), read(int64, 1), read(float32, 2), read(float32, 2), float32,
    float32[:, ::1], uint8[:, ::1],
)  # fmt: skip
def round_channels(
    weights: np.ndarray, values: np.ndarray, shares: np.ndarray, blocks: np.ndarray, steps: np.ndarray, zeros: np.ndarray,
    top: float, errors: np.ndarray, levels: np.ndarray,
) -> None:  # fmt: skip
    """Round channels one after the other, each after it has made up for its share of the errors of those before it.

    weights float32 [channels, R]; values float32 [channels, R]: the same with what makes up for earlier errors; shares
    float32 [channels, channels]: of the error of a row's channel, what a column's takes over; blocks int64 [channels]:
    the block of each; steps, zeros float32 [blocks, R]: a weight becomes (level − zero)·step with a level from 0 to
    `top`. levels uint8 and errors float32 [channels, R] are filled: weights − what they become.
    """
    run_errors, value = np.empty((len(values), RUN), np.float32), np.empty(RUN, np.float32)
    for start in range(0, values.shape[1], RUN):
        stop = min(start + RUN, values.shape[1])
        for channel in range(len(values)):
            # short loops over few arrays: of longer ones the compiler makes no vectors
            weight, level, error = weights[channel, start:stop], levels[channel, start:stop], errors[channel, start:stop]
            step, zero, own = steps[blocks[channel], start:stop], zeros[blocks[channel], start:stop], run_errors[channel]
            for row in range(len(weight)):
                value[row] = values[channel, start + row]
            for before in range(channel):
                share = shares[before, channel]
                for row in range(len(weight)):
                    value[row] += share * run_errors[before, row]
            for row in range(len(weight)):
                inverse = np.float32(1) / step[row] if step[row] > 0 else np.float32(0)
                own[row] = min(max(np.rint(value[row] * inverse) + zero[row], np.float32(0)), top)
            for row in range(len(weight)):
                level[row] = np.uint8(own[row])
            for row in range(len(weight)):
                own[row] = weight[row] - (own[row] - zero[row]) * step[row]
            for row in range(len(weight)):
                error[row] = own[row]
