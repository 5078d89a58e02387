"""Which expert the tokens of answers came from, as shares."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fusionroute.fr_export.evaluation.outcomes import Outcomes


def by_domain(outcomes: Mapping[str, Outcomes]) -> np.ndarray:
    """Share of each expert in a domain's tokens, float64 [domains, n]; NaN for a domain without tokens."""
    return _shares(np.stack([own.counts.sum((0, 2)) for own in outcomes.values()]))


def by_class(outcomes: Mapping[str, Outcomes]) -> np.ndarray:
    """Share of each expert in the tokens of each class over all domains, float64 [C, n]; NaN for a class that no token has."""
    return _shares(np.sum([own.counts.sum(0) for own in outcomes.values()], axis=0).T)


def _shares(counts: np.ndarray) -> np.ndarray:
    totals = counts.sum(-1, keepdims=True)
    shares: np.ndarray = np.divide(counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)
    return shares
