"""λ of the weighted fusion: accuracy over its range, the best one, and how it gets into a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fusionroute.fr_export.evaluation.outcomes import Results
from fusionroute.runtime.errors import FusionError
from fusionroute.runtime.manifest import Manifest

GRID = tuple(step / 10 for step in range(11))

Curve = list[tuple[float, float]]
"""Pairs of λ and average accuracy over domains, λ rising."""


def methods(grid: Sequence[float] = GRID) -> list[str]:
    """Names of the methods that `evaluate` sweeps λ with."""
    return [f"lambda:{lam:g}" for lam in grid]


def curve(results: Results, grid: Sequence[float] = GRID) -> Curve:
    """Accuracy at each λ, averaged over domains."""
    averages = (results[name].values() for name in methods(grid))
    return [(lam, sum(one.accuracy for one in domains) / len(domains)) for lam, domains in zip(grid, averages, strict=True)]


def best(points: Curve) -> float:
    """The λ of the highest accuracy; among equals the one closest to the default 0.5, and then the lower one."""
    return min(points, key=lambda point: (-round(point[1], 9), abs(point[0] - 0.5), point[0]))[0]


def write(bundle: Path, points: Curve) -> None:
    """Write the best λ of a curve and the curve itself into the bundle's manifest, in one step.

    Raises BundleError where there is no bundle, FusionError where it cannot be written.
    """
    manifest = Manifest.read(bundle)
    try:
        manifest.model_copy(update={"lam": best(points), "lam_curve": points}).write(bundle)
    except OSError as error:
        raise FusionError(f"The manifest of {bundle} cannot be written ({error.strerror}): tune a copy that you may write to.") from error
