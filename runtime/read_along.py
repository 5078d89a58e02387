"""Whether experts that are not guessed read in the router's pass too, so that a wrong guess costs no second pass."""

from __future__ import annotations

from collections.abc import Set
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
    every pass, depends neither on the clock nor on other texts: guesses that learned from those do not count here, nor do
    experts that have read in those alone. prices: None where no more than one expert reads beside the router.
    """

    prices: PassPrices | None
    spared: Rate = field(default_factory=lambda: Rate(0.0, 4.0))
    guesses: ExpertGuesses = field(default_factory=ExpertGuesses)
    answered: set[int] = field(default_factory=set)

    def readers(self, near: Set[int]) -> list[int]:
        """Who reads beside the router, of those `near` enough to: none where only a guessed expert should."""
        prices, own = self.prices, sorted(near & self.answered)
        if prices is None or len(own) < 2:
            return []
        more = (prices.every - prices.pair) * (len(own) - 1) / (prices.experts - 1)
        return own if self.spared.mean * prices.alone > more else []

    def saw(self, token: int, expert: int, near: Set[int]) -> None:
        """An expert answered behind a token, and those `near` could have read along."""
        guess = next(iter(self.guesses.likely(token)), None)
        self.spared.saw(guess is not None and guess != expert and expert in near & self.answered, 1)
        self.guesses.saw(token, expert)
        self.answered.add(expert)
