"""The compiled loops of observers. Only those import this: it takes numba, which comes with the exporter."""

import numpy as np
from numba import float32, float64, int64

from fusionroute.calibration.compiled import compiled, read


@compiled(read(float32, 2), float32[::1], float32[::1], float64[::1])
def add_moments(rows: np.ndarray, low: np.ndarray, high: np.ndarray, squares: np.ndarray) -> None:
    """Add rows float32 [S, K] to what is known of each channel: smallest and largest value float32 [K], and the sum of
    squares float64 [K]. The sum is not finite where a value is not.
    """
    for number in range(len(rows)):
        row = rows[number]
        for channel in range(len(row)):
            low[channel], high[channel] = min(low[channel], row[channel]), max(high[channel], row[channel])
        for channel in range(len(row)):
            squares[channel] += np.float64(row[channel]) ** 2


@compiled(read(float32, 1), float32, int64[::1])
def count_magnitudes(values: np.ndarray, scale: float, counts: np.ndarray) -> None:
    """Count each of the values float32 [N] in bin ⌊|value|·scale⌋ of counts int64 [bins], which must hold it."""
    for at in range(len(values)):
        counts[int64(abs(values[at]) * scale)] += 1
