"""Speculative sampling (arXiv:2211.17192, algorithm 1): a token drawn from q, verified so that what comes out is distributed as p."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Distribution:
    """Probabilities float64 [n] of some tokens, ids int64 [n] each once; `ids` None: of the whole vocabulary in order. Others have none."""

    ids: npt.NDArray[np.int64] | None
    probabilities: npt.NDArray[np.float64]

    def at(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Probabilities of `ids`."""
        if self.ids is None:
            return self.probabilities[ids]
        order = np.argsort(self.ids)
        places = np.minimum(np.searchsorted(self.ids, ids, sorter=order), len(order) - 1)
        found = order[places]
        return np.where(self.ids[found] == ids, self.probabilities[found], 0.0)

    def draw(self, uniform: float, weights: npt.NDArray[np.float64] | None = None) -> int:
        """The token that a uniform number in [0, 1) falls on, by `weights` in place of the probabilities where they are given."""
        mass = np.cumsum(self.probabilities if weights is None else weights)
        place = min(int(mass.searchsorted(uniform * mass[-1], side="right")), len(mass) - 1)
        return place if self.ids is None else int(self.ids[place])


def certain(token: int) -> Distribution:
    """All mass on one token: a guess that was not drawn."""
    return Distribution(np.array([token], np.int64), np.ones(1))


def verify(p: Distribution, q: Distribution, draft: int, random: np.random.Generator) -> int:
    """A token distributed as p, given `draft` drawn from q: the draft with probability min(1, p/q), else one drawn from max(p − q, 0)."""
    token = np.array([draft], np.int64)
    if random.random() * float(q.at(token)[0]) < float(p.at(token)[0]):
        return draft
    ids = np.arange(len(p.probabilities), dtype=np.int64) if p.ids is None else p.ids
    residual = np.maximum(p.probabilities - q.at(ids), 0.0)
    return p.draw(random.random(), residual if residual.sum() > 0 else None)  # p = q up to rounding: any draw from p will do
