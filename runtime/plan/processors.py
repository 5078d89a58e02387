"""How fast processors decode, fitted to this project's own runs.

seconds per token = max(bytes / bandwidth, values / rate) + a · layers. A processor of few cores is bound by its
arithmetic where weights are narrow, and by its memory where they are wide: the slower of the two counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusionroute.runtime.plan.least_squares import Floats, descend, spread
from fusionroute.runtime.plan.measurements import Measurement, Pass

CLASSES = (5.5, 9.0, 32.0)  # bits of weights up to which a rate holds: 4, 8, and all others
CORES = 2  # of the processors that were measured
START = np.log([25e9, 20e9, 10e9, 1e-4])


@dataclass(frozen=True)
class Processor:
    """rates: values that a core multiplies per second, by CLASSES. per_layer: seconds. spread: as of `Efficiency`."""

    rates: tuple[float, ...]
    per_layer: float
    spread: float

    def seconds(self, work: Pass) -> float:
        """Of one pass."""
        rate = self.rates[class_of(work.bits)] * work.cores
        return max(work.read / work.bandwidth, work.values / rate) + self.per_layer * work.layers


def class_of(bits: float) -> int:
    """Which of the rates holds for weights of so many bits."""
    return next((number for number, most in enumerate(CLASSES) if bits <= most), len(CLASSES) - 1)


def fitted(rows: Sequence[Measurement]) -> Processor:
    """What fits rows best, as `efficiency.fitted`."""
    read, layers, values, bandwidth = (
        np.array([getattr(row.work, name) for row in rows], float) for name in ("read", "layers", "values", "bandwidth")
    )
    decode, classes = np.array([row.decode for row in rows]), [class_of(row.work.bits) for row in rows]

    def residuals(point: Floats) -> Floats:
        seconds = np.maximum(read / bandwidth, values / np.exp(point[classes])) + np.exp(point[-1]) * layers
        return np.asarray(np.log(seconds * decode))

    point = descend(residuals, START)
    rates = tuple(float(rate) / CORES for rate in np.exp(point[:-1]))
    return Processor(rates, float(np.exp(point[-1])), spread(residuals(point)))
