"""Whether experts that are not guessed read in the router's pass too, so that a wrong guess costs no second pass."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from fusionroute.runtime.expert_guesses import ExpertGuesses
from fusionroute.runtime.rate import Rate


@dataclass(frozen=True)
class PassPrices:
    """Seconds of passes over one token of each model that reads: of the router and one expert, of the router and all
    `experts`, and of one expert alone.
    """

    pair: float
    every: float
    alone: float
    experts: int


@dataclass
class ReadAlong:
    """The choice for one text, from what passes cost and from how often reading along would have spared a second pass.

    Costs are measured at load, and all else depends on this text's tokens alone. So the choice, and with it the length of
    every pass, depends neither on the clock nor on earlier texts: guesses that learned from those do not count here.
    """

    prices: PassPrices | None
    spared: Rate = field(default_factory=lambda: Rate(0.0, 4.0))
    guesses: ExpertGuesses = field(default_factory=ExpertGuesses)

    def pays(self, readers: int) -> bool:
        """Whether it is cheaper to let so many experts read than only the guessed one."""
        prices = self.prices
        if prices is None or readers < 2:
            return False
        more = (prices.every - prices.pair) * (readers - 1) / (prices.experts - 1)
        return self.spared.mean * prices.alone > more

    def saw(self, token: int, expert: int, near: Collection[int]) -> None:
        """An expert answered behind a token; those `near` could have read along."""
        guess = next(iter(self.guesses.likely(token)), None)
        self.spared.saw(guess is not None and guess != expert and expert in near, 1)
        self.guesses.saw(token, expert)
