"""How much of a memory's bandwidth decoding reaches, fitted to what others measured.

seconds per token = bytes / (bandwidth · e) + a · layers, with e = share · (bits / 16)^slope. `a` is what a layer costs
however small it is, so small models reach less: more where each kernel is launched by itself than where a step is
captured as one CUDA graph. The slope says how much less of the bandwidth narrow weights reach.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import numpy as np

from fusionroute.runtime.plan.devices import Kind
from fusionroute.runtime.plan.measurements import Measurement, measurements

Floats: TypeAlias = "np.ndarray[tuple[int, ...], np.dtype[np.float64]]"
WIDEST = 16.0  # bits
TOLERATED = 0.15  # residuals of the logarithm beyond it weigh less (Huber)
ROUNDS, STEP, ENOUGH = 60, 1e-5, 1e-9
START = np.array([np.log(0.85), 0.0, np.log(4e-5), np.log(2e-5)])
COVERED = 0.9  # of the rows lie within the range


@dataclass(frozen=True)
class Efficiency:
    """share: of the bandwidth that 16-bit weights reach; slope: see the module; per_layer: seconds, `launching` more
    where the step is not captured.

    spread: factor by which rows differ from the estimate, either way; nine in ten differ less.
    """

    share: float
    slope: float
    per_layer: float
    launching: float
    spread: float

    def share_at(self, bits: float) -> float:
        """Share of the bandwidth that weights of so many bits reach."""
        return float(self.share * (min(bits, WIDEST) / WIDEST) ** self.slope)

    def seconds(self, read: float, layers: float, bits: float, bandwidth: float, captured: bool = True) -> float:
        """Of one pass that reads so many bytes."""
        return read / (bandwidth * self.share_at(bits)) + (self.per_layer + (0 if captured else self.launching)) * layers

    def tokens_per_second(self, row: Measurement) -> float:
        """The estimate for a row."""
        return 1 / self.seconds(row.read, row.layers, row.bits, row.bandwidth, row.captured)


def fitted(rows: Sequence[Measurement]) -> Efficiency:
    """The efficiency that fits rows best: least squares of the logarithm of the speed, outliers weighing less."""
    read, layers, bits, bandwidth, decode, captured = (
        np.array([getattr(row, name) for row in rows], float) for name in ("read", "layers", "bits", "bandwidth", "decode", "captured")
    )
    ideal, narrow = read / bandwidth, np.log(np.minimum(bits, WIDEST) / WIDEST)

    def residuals(point: Floats) -> Floats:
        per_layer = np.exp(point[2]) + np.exp(point[3]) * (1 - captured)
        seconds = ideal / np.exp(point[0] + point[1] * narrow) + per_layer * layers
        return np.asarray(np.log(seconds * decode))

    point = descend(residuals, START)
    spread = float(np.exp(np.quantile(np.abs(residuals(point)), COVERED)))
    return Efficiency(float(np.exp(point[0])), float(point[1]), float(np.exp(point[2])), float(np.exp(point[3])), spread)


def descend(residuals: Callable[[Floats], Floats], point: Floats) -> Floats:
    """Gauss-Newton with Huber's weights; steps that are damped more where they do not help."""
    damping = 1e-3
    for _ in range(ROUNDS):
        here = residuals(point)
        weights = TOLERATED / np.maximum(np.abs(here), TOLERATED)
        slopes = np.stack([(residuals(point + step) - here) / STEP for step in STEP * np.eye(len(point))], axis=1)
        normal = slopes.T @ (weights[:, None] * slopes)
        moved = point - np.linalg.solve(normal + damping * np.eye(len(point)), slopes.T @ (weights * here))
        gain = huber(here) - huber(residuals(moved))
        if gain > 0:
            point, damping = moved, damping / 4
        else:
            damping *= 4
        if 0 < gain < ENOUGH or damping > 1 / ENOUGH:
            break
    return point


def huber(values: Floats) -> float:
    """Squares of small residuals, and multiples of large ones."""
    size = np.abs(values)
    return float(np.where(size < TOLERATED, size**2 / 2, TOLERATED * (size - TOLERATED / 2)).sum())


@cache
def efficiency(kind: Kind) -> Efficiency:
    """Fitted to all rows of GPUs, or of processors, that say enough to count bytes."""
    return fitted([row for row in measurements(kind) if row.sure])


def left_out_errors(rows: Sequence[Measurement]) -> list[float]:
    """For each row the relative error of its tokens/s, by a fit to the rows of all other devices."""
    return [fitted([other for other in rows if other.device != row.device]).tokens_per_second(row) / row.decode - 1 for row in rows]
