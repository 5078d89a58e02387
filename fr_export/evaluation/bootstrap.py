"""Bootstrap intervals of means over prompts, and the paired bootstrap between two methods on the same prompts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
LEVEL = 0.95


class Interval(NamedTuple):
    """A mean and its percentile bootstrap interval at LEVEL (Efron 1979)."""

    value: float
    low: float
    high: float


class Comparison(NamedTuple):
    """Difference of two means on the same prompts, its interval, and the two-sided p-value of "no difference"."""

    difference: float
    low: float
    high: float
    p: float


def interval(values: Sequence[np.ndarray], seed: int = 0) -> Interval:
    """The mean of per-prompt values, one array [N_d] per domain; over several domains the average of their means.

    Resamples draw prompts with replacement within each domain.
    """
    means = _means(values, seed)
    return Interval(_average(values), *_ends(means))


def compare(first: Sequence[np.ndarray], second: Sequence[np.ndarray], seed: int = 0) -> Comparison:
    """By how much the mean of `first` exceeds that of `second` (paired bootstrap, Koehn 2004).

    Arrays are as for `interval`; prompt i is the same in both. p is twice the smaller share of resamples on one side of
    zero; both shares count ties and the sample itself.
    """
    differences = [np.subtract(a, b, dtype=np.float64) for a, b in zip(first, second, strict=True)]
    means = _means(differences, seed)
    # sums of resampled equal values round
    side = min(np.count_nonzero(means <= 1e-9), np.count_nonzero(means >= -1e-9))
    return Comparison(_average(differences), *_ends(means), min(1.0, 2 * (int(side) + 1) / (RESAMPLES + 1)))


def _average(values: Sequence[np.ndarray]) -> float:
    return float(np.mean([np.mean(own, dtype=np.float64) for own in values]))


def _means(values: Sequence[np.ndarray], seed: int) -> npt.NDArray[np.float64]:
    """The statistic on each resample, float64 [RESAMPLES]."""
    domains = [_weights(len(own), seed, domain) @ own.astype(np.float32) for domain, own in enumerate(values)]
    return np.mean(domains, axis=0, dtype=np.float64)  # type: ignore[no-any-return]


def _ends(means: npt.NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


@functools.lru_cache(maxsize=8)
def _weights(count: int, seed: int, domain: int) -> npt.NDArray[np.float32]:
    """How often each of N prompts is drawn in each resample, divided by N: float32 [RESAMPLES, N].

    Means are one product with it.
    """
    rng = np.random.default_rng((seed, domain))
    weights = np.empty((RESAMPLES, count), np.float32)
    for row in weights:
        row[:] = np.bincount(rng.integers(count, size=count), minlength=count)
    weights /= count
    return weights
