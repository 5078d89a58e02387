"""The formulas that merge experts: pure functions of the base's values and the experts' values.

Written by hand: mergekit computes the same, but brings 400 MB of packages (datasets, pandas, pyarrow, scipy) for three
formulas.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from fusionroute.runtime.errors import InputError

Method = Literal["average", "task_arithmetic", "dare"]
SETTINGS: dict[Method, tuple[str, ...]] = {"average": (), "task_arithmetic": ("scale",), "dare": ("scale", "drop", "seed")}
"""The settings that each method uses."""
Values = npt.NDArray[np.float32]
Formula = Callable[[Values, Sequence[Values]], Values]
"""(base, experts) → merged values, all float32 of one shape."""


def average(base: Values, experts: Sequence[Values]) -> Values:
    """The mean of the experts' values (model soups, arXiv:2203.05482); the base does not count."""
    merged: Values = np.mean(experts, axis=0, dtype=np.float32)
    return merged


def task_arithmetic(base: Values, experts: Sequence[Values], scale: float) -> Values:
    """base + scale · Σ (expert − base) (arXiv:2212.04089)."""
    return _add_differences(base, [expert - base for expert in experts], scale)


def dare(base: Values, experts: Sequence[Values], scale: float, drop: float, random: np.random.Generator) -> Values:
    """Task arithmetic on sparse differences (arXiv:2311.03099).

    Each entry of each expert − base is set to zero with probability `drop`, and divided by 1 − drop otherwise, so that
    its mean stays.
    """
    sparse = [(expert - base) * (random.random(base.shape, np.float32) >= drop) / np.float32(1 - drop) for expert in experts]
    return _add_differences(base, sparse, scale)


def _add_differences(base: Values, differences: Sequence[Values], scale: float) -> Values:
    merged: Values = base + np.float32(scale) * np.sum(differences, axis=0, dtype=np.float32)
    return merged


def formula(method: str, scale: float = 1.0, drop: float = 0.5, seed: int = 0) -> Formula:
    """The method with its settings. Raises InputError for an unknown method, and for a setting that is out of range."""
    if method not in get_args(Method):
        raise InputError(f"Unknown method '{method}'; expected {', '.join(get_args(Method))}.")
    if not math.isfinite(scale):
        raise InputError(f"scale={scale} is no finite number; expected one such as 0.5.")
    if not 0 <= drop < 1:
        raise InputError(f"drop={drop} is out of range; expected a probability from 0 to below 1.")
    if seed < 0:
        raise InputError(f"seed={seed} is negative; expected a whole number from 0.")
    if method == "average":
        return average
    if method == "task_arithmetic":
        return partial(task_arithmetic, scale=scale)
    return partial(dare, scale=scale, drop=drop, random=np.random.default_rng(seed))
