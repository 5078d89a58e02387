"""How much of a GPU's memory bandwidth decoding reaches, fitted to what others measured.

seconds per token = bytes / (bandwidth · e) + a · layers, with e = share · (bits / 16)^slope. `a` is what a layer costs
however small it is, so small models reach less: more where each kernel is launched by itself than where a step is
captured as one CUDA graph. The slope says how much less of the bandwidth narrow weights reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusionroute.runtime.plan.least_squares import Floats, descend, spread
from fusionroute.runtime.plan.measurements import Measurement, Pass

WIDEST = 16.0  # bits
START = np.array([np.log(0.85), 0.0, np.log(4e-5), np.log(2e-5)])


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

    def seconds(self, work: Pass) -> float:
        """Of one pass."""
        per_layer = self.per_layer + (0.0 if work.captured else self.launching)
        return work.read / (work.bandwidth * self.share_at(work.bits)) + per_layer * work.layers


def fitted(rows: Sequence[Measurement]) -> Efficiency:
    """The efficiency that fits rows best: least squares of the logarithm of the speed, outliers weighing less."""
    read, layers, bits, bandwidth, captured = (
        np.array([getattr(row.work, name) for row in rows], float) for name in ("read", "layers", "bits", "bandwidth", "captured")
    )
    decode = np.array([row.decode for row in rows])
    ideal, narrow = read / bandwidth, np.log(np.minimum(bits, WIDEST) / WIDEST)

    def residuals(point: Floats) -> Floats:
        per_layer = np.exp(point[2]) + np.exp(point[3]) * (1 - captured)
        seconds = ideal / np.exp(point[0] + point[1] * narrow) + per_layer * layers
        return np.asarray(np.log(seconds * decode))

    point = descend(residuals, START)
    share, _, per_layer, launching = (float(value) for value in np.exp(point))
    return Efficiency(share, float(point[1]), per_layer, launching, spread(residuals(point)))


def left_out_errors(rows: Sequence[Measurement]) -> list[float]:
    """For each row the relative error of its tokens/s, by a fit to the rows of all other devices."""
    errors = []
    for row in rows:
        fit = fitted([other for other in rows if other.device != row.device])
        errors.append(1 / fit.seconds(row.work) / row.decode - 1)
    return errors
