"""Speculative sampling (arXiv:2211.17192, algorithm 1): drafts drawn from q become tokens distributed as p."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fusionroute.runtime.sampling import PRECISE

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Distribution:
    """Probabilities float64 [n] of distinct tokens `ids` int64 [n]. All others have probability zero."""

    ids: npt.NDArray[np.int64]
    probabilities: Floats

    def probabilities_of(self, ids: npt.NDArray[np.int64]) -> Floats:
        """Probabilities of `ids`."""
        order = np.argsort(self.ids)
        places = np.minimum(np.searchsorted(self.ids, ids, sorter=order), len(order) - 1)
        nearest = order[places]
        return np.where(self.ids[nearest] == ids, self.probabilities[nearest], 0.0)

    def excess_over(self, other: "Distribution") -> Floats:
        """max(p − q, 0) of each token, where q is the other distribution."""
        return np.maximum(self.probabilities - other.probabilities_of(self.ids), 0.0)

    def draw(self, uniform: float, weights: Floats | None = None) -> int:
        """The token that a uniform number in [0, 1) falls on. `weights` [n], if given, replace the probabilities."""
        return int(self.ids[inverse_cdf(uniform, self.probabilities if weights is None else weights)])


class Softmax:
    """softmax(logits / temperature) over the whole vocabulary, logits float32 [V], with the methods of `Distribution`.

    Only `excess_over` and `draw` sum over the vocabulary: a draft that holds asks for one probability. `log_normaliser`
    is the float32 logsumexp of logits / temperature.
    """

    def __init__(self, logits: npt.NDArray[np.float32], temperature: float, log_normaliser: float):
        self._logits, self._temperature, self._log_normaliser = logits, temperature, log_normaliser

    def probabilities_of(self, ids: npt.NDArray[np.int64]) -> Floats:
        """Probabilities of `ids`."""
        if abs(self._log_normaliser) > PRECISE:
            return self._all()[ids]
        probabilities: Floats = np.exp(self._logits[ids].astype(np.float64) / self._temperature - self._log_normaliser)
        return probabilities

    def excess_over(self, other: Distribution) -> Floats:
        """max(p − q, 0) of each token, where q is the other distribution."""
        excess = self._all()
        excess[other.ids] = np.maximum(excess[other.ids] - other.probabilities, 0.0)
        return excess

    def draw(self, uniform: float, weights: Floats | None = None) -> int:
        """See `Distribution.draw`."""
        return inverse_cdf(uniform, self._all() if weights is None else weights)

    def _all(self) -> Floats:
        mass: Floats = self._logits.astype(np.float64)
        mass /= self._temperature
        mass -= mass.max()
        np.exp(mass, out=mass)
        mass /= mass.sum()
        return mass


def inverse_cdf(uniform: float, weights: Floats) -> int:
    """The index that a uniform number in [0, 1) falls on, by weights [n] that need not sum to 1."""
    mass = np.cumsum(weights)
    return min(int(mass.searchsorted(uniform * mass[-1], side="right")), len(mass) - 1)


def certain(token: int) -> Distribution:
    """All mass on one token: a draft that was not drawn."""
    return Distribution(np.array([token], np.int64), np.ones(1))


def verify(p: Distribution | Softmax, q: Distribution, draft: int, random: np.random.Generator) -> int:
    """A token distributed as p: the `draft` from q with probability min(1, p/q), else one drawn from max(p − q, 0)."""
    token = np.array([draft], np.int64)
    if random.random() * float(q.probabilities_of(token)[0]) < float(p.probabilities_of(token)[0]):
        return draft
    residual = p.excess_over(q)
    return p.draw(random.random(), residual if residual.sum() > 0 else None)  # else p = q but for rounding
