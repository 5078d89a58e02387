"""A running share that forgets."""

from __future__ import annotations

from dataclasses import dataclass

MEMORY = 0.97  # of the weight of earlier trials that each new one leaves


@dataclass
class Rate:
    """A running share of hits that forgets old trials."""

    hits: float
    trials: float

    @property
    def mean(self) -> float:
        """Between 0 and 1."""
        return self.hits / self.trials

    def saw(self, hits: float, trials: int) -> None:
        """`hits` of `trials` were hits."""
        weight = MEMORY**trials
        self.hits, self.trials = self.hits * weight + hits, self.trials * weight + trials
