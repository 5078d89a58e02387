"""Numbers that fit measurements best, where single measurements may be far off."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

Floats: TypeAlias = "np.ndarray[tuple[int, ...], np.dtype[np.float64]]"
TOLERATED = 0.15  # residuals beyond it weigh less (Huber)
ROUNDS, STEP, ENOUGH = 60, 1e-5, 1e-9
COVERED = 0.9  # of the rows lie within the spread


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


def spread(residuals: Floats) -> float:
    """The factor within which nine in ten of the rows lie, of residuals of a logarithm."""
    return float(np.exp(np.quantile(np.abs(residuals), COVERED)))
