"""Each expert's share of the tokens in answers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fusionroute.fr_export.evaluation.outcomes import Outcomes


def by_domain(outcomes: Mapping[str, Outcomes]) -> np.ndarray:
    """Each expert's share of a domain's tokens, float64 [domains, n]; NaN for a domain without tokens."""
    return _shares(np.stack([own.counts.sum((0, 2)) for own in outcomes.values()]))


def by_class(outcomes: Mapping[str, Outcomes]) -> np.ndarray:
    """Each expert's share of the tokens of a class over all domains, float64 [C, n]; NaN for a class without tokens."""
    return _shares(np.sum([own.counts.sum(0) for own in outcomes.values()], axis=0).T)


def _shares(counts: np.ndarray) -> np.ndarray:
    totals = counts.sum(-1, keepdims=True)
    shares: np.ndarray = np.divide(counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)
    return shares
