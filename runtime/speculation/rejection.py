"""Speculative sampling (arXiv:2211.17192, algorithm 1): a token drawn from q, verified so that what comes out is distributed as p."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Distribution:
    """Probabilities float64 [n] of the tokens `ids` int64 [n], each once. Others have none."""

    ids: npt.NDArray[np.int64]
    probabilities: Floats

    def at(self, ids: npt.NDArray[np.int64]) -> Floats:
        """Probabilities of `ids`."""
        order = np.argsort(self.ids)
        places = np.minimum(np.searchsorted(self.ids, ids, sorter=order), len(order) - 1)
        found = order[places]
        return np.where(self.ids[found] == ids, self.probabilities[found], 0.0)

    def less(self, other: "Distribution") -> Floats:
        """By how much each probability is above the other's."""
        return np.maximum(self.probabilities - other.at(self.ids), 0.0)

    def draw(self, uniform: float, weights: Floats | None = None) -> int:
        """The token that a uniform number in [0, 1) falls on, by `weights` in place of the probabilities where they are given."""
        return int(self.ids[fallen(uniform, self.probabilities if weights is None else weights)])


class Softmax:
    """softmax(logits / temperature) of the whole vocabulary, logits float32 [V]: what `Distribution` is of few tokens.

    It sums over the vocabulary only for `less` and `draw`: a draft that holds asks for one probability. `log_normaliser` is the float32
    logsumexp of logits / temperature.
    """

    def __init__(self, logits: npt.NDArray[np.float32], temperature: float, log_normaliser: float):
        self._logits, self._temperature, self._log_normaliser = logits, temperature, log_normaliser

    def at(self, ids: npt.NDArray[np.int64]) -> Floats:
        """Probabilities of `ids`."""
        found: Floats = np.exp(self._logits[ids].astype(np.float64) / self._temperature - self._log_normaliser)
        return found

    def less(self, other: Distribution) -> Floats:
        """By how much each probability is above the other's."""
        found = self._all()
        found[other.ids] = np.maximum(found[other.ids] - other.probabilities, 0.0)
        return found

    def draw(self, uniform: float, weights: Floats | None = None) -> int:
        """See `Distribution.draw`."""
        return fallen(uniform, self._all() if weights is None else weights)

    def _all(self) -> Floats:
        mass: Floats = self._logits.astype(np.float64)
        mass /= self._temperature
        mass -= mass.max()
        np.exp(mass, out=mass)
        mass /= mass.sum()
        return mass


def fallen(uniform: float, weights: Floats) -> int:
    """The place that a uniform number in [0, 1) falls on."""
    mass = np.cumsum(weights)
    return min(int(mass.searchsorted(uniform * mass[-1], side="right")), len(mass) - 1)


def certain(token: int) -> Distribution:
    """All mass on one token: a guess that was not drawn."""
    return Distribution(np.array([token], np.int64), np.ones(1))


def verify(p: Distribution | Softmax, q: Distribution, draft: int, random: np.random.Generator) -> int:
    """A token distributed as p, given `draft` drawn from q: the draft with probability min(1, p/q), else one drawn from max(p − q, 0)."""
    token = np.array([draft], np.int64)
    if random.random() * float(q.at(token)[0]) < float(p.at(token)[0]):
        return draft
    residual = p.less(q)
    return p.draw(random.random(), residual if residual.sum() > 0 else None)  # p = q up to rounding: any draw from p will do
