"""How many ranks the factors of each matrix get: the same for all, or those that lower the error most for their bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusionroute.fr_export.precision.approximation import Spectrum

FACTOR_BITS = 32  # of a value of the factors


@dataclass(frozen=True)
class Ranks:
    """The rank of each matrix by the name of its factors, and what they come to.

    bits: of the factors, per weight of the base. left: the share of the change's squared size that they leave out; error:
    that, as a share of the products' squared size. Both are means over the matrices, on the inputs that calibration saw.
    """

    of: dict[str, int]
    bits: float
    left: float
    error: float


@dataclass(frozen=True)
class RankBudget:
    """`rank` for every matrix, or `bits` per weight of the base for all factors of an expert."""

    rank: int | None = None
    bits: float | None = None

    def values(self, weights: int, sides: int) -> int:
        """About how many values an expert's factors have, for matrices of so many weights, whose sides add up to `sides`."""
        return int(weights * self.bits / FACTOR_BITS) if self.bits is not None else sides * (self.rank or 0)

    def spread(self, spectra: Sequence[Spectrum], weights: int) -> Ranks:
        """The ranks for an expert. `weights`: how many the base's matrices have."""
        lengths = [len(each.gains) for each in spectra]
        if self.bits is None:
            ranks = [min(self.rank or 0, length) for length in lengths]
        else:
            ranks = self._greedy(spectra, lengths, weights * self.bits / FACTOR_BITS)
        values = sum(rank * each.values for rank, each in zip(ranks, spectra, strict=True))
        left = sum(float(each.gains[rank:].sum()) for rank, each in zip(ranks, spectra, strict=True))
        total, count = sum(float(each.gains.sum()) for each in spectra), sum(len(each.names) for each in spectra)
        of = {name: rank for rank, each in zip(ranks, spectra, strict=True) for name in each.names}
        return Ranks(of, values * FACTOR_BITS / weights, left / total if total else 0.0, left / count)

    @staticmethod
    def _greedy(spectra: Sequence[Spectrum], lengths: Sequence[int], values: float) -> list[int]:
        """Rank after rank, the one that gains most per value next: gains fall, so no other choice of this size gains more."""
        owner = np.repeat(np.arange(len(spectra)), lengths)
        costs = np.array([each.values for each in spectra])[owner]
        order = np.argsort(-np.concatenate([each.gains for each in spectra]) / costs, kind="stable")
        taken = order[: np.searchsorted(np.cumsum(costs[order]), values, side="right")]
        return [int(rank) for rank in np.bincount(owner[taken], minlength=len(spectra))]
