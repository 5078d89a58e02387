"""How far to draft ahead: the cost of a draft on this machine against the acceptance rate in this text.

Costs are measured at load and the acceptance rate comes from the tokens. So the choice, and with it the length of every
pass, does not depend on the clock.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from fusionroute.runtime.limits import MAX_ROUND_TOKENS
from fusionroute.runtime.rate import Rate
from fusionroute.runtime.speculation.costs import Costs, seconds_by_tokens

PRIORS = {"router": (0.5, 1.0), "lookup": (0.5, 2.0)}  # acceptance rate at first, and how many drafts that is worth
MIN_SPEEDUP = 1.1  # over plain decoding, or no drafts: costs are not known much better than that
MIN_STEP_SECONDS = 1e-3  # a faster plain step is never drafted for: planning and learning would take a tenth of it
LENGTH_STEP = 128  # tokens after which costs are looked up for the new length
FREE = [0.0] * (MAX_ROUND_TOKENS + 1)  # seconds of a model that does not run


class Prices(NamedTuple):
    """Seconds without fusions. plain: of a step. miss: of its second pass, if the guessed expert does not answer.

    looked_up and drafted: of a round of 0 … MAX_ROUND_TOKENS rows, by where its drafts come from. switch: of an expert
    that takes its turn within a round.
    """

    plain: float
    miss: float
    looked_up: list[float]
    drafted: list[float]
    switch: float


@dataclass
class DraftPlan:
    """How many rows to verify, all but one of them drafts, and where the drafts come from. rows = 1: a plain step."""

    source: str
    rows: int


@dataclass
class DraftPlanner:
    """The choice for one text. `exact`: tokens are read by twos."""

    costs: Costs
    exact: bool = False
    rates: dict[str, Rate] = field(default_factory=lambda: {name: Rate(mean * weight, weight) for name, (mean, weight) in PRIORS.items()})
    switches: Rate = field(default_factory=lambda: Rate(0.5, 2.0))
    misses: Rate = field(default_factory=lambda: Rate(0.5, 2.0))
    _priced: tuple[int, bool, int | None] = (-1, False, None)  # length in LENGTH_STEPs, router and expert that the prices are for
    _prices: Prices = field(default=Prices(0.0, 0.0, [], [], 0.0), init=False)

    @property
    def pays(self) -> bool:
        """Whether drafts can pay at all: a plain step takes longer than planning."""
        if self.costs.joint is not None:
            return self.costs.joint[0][0][0] >= MIN_STEP_SECONDS
        expert = min((passes[0][0] for passes in self.costs.experts), default=0.0)
        # with concurrent models the measured pass of a single token is only queued: its time says nothing
        return self.costs.concurrent or self.costs.router[0][0] + expert >= MIN_STEP_SECONDS

    def plan(self, most: int, looked_up: int, router: bool, expert: int | None, length: int, plain: float | None = None) -> DraftPlan:
        """The fastest way to produce up to `most` tokens behind `length` others, if the text offers `looked_up` drafts.

        `router`: whether the router runs. `expert`: the expert that is likely to answer (None: none runs; the router's
        own drafts then verify nothing). `plain`: seconds of a plain step, where it is one pass whoever answers.
        """
        prices, fusion = self._prices_of(length, router, expert), self.costs.fusion
        switching, missing = self.switches.mean * prices.switch, self.misses.mean * prices.miss
        step = prices.plain + missing if plain is None else plain
        best, fastest = DraftPlan("router", 1), (step + fusion) / MIN_SPEEDUP
        rows_offered = {
            "lookup": min(looked_up + 1, most, MAX_ROUND_TOKENS),
            "router": min(most, MAX_ROUND_TOKENS) if router and expert is not None else 1,
        }
        by_rows = {"lookup": prices.looked_up, "router": prices.drafted}
        for source, limit in rows_offered.items():
            rate = self.rates[source].mean
            tokens = power = 1.0
            for rows in range(2, limit + 1):
                power *= rate
                tokens += power  # expected: 1 + a + a² + …
                # experts that take turns within a round are read one after the other, as far as drafts hold
                seconds = (by_rows[source][rows] + missing + switching * (tokens - 1)) / tokens + fusion
                if seconds < fastest:
                    best, fastest = DraftPlan(source, rows), seconds
        return best

    def _prices_of(self, length: int, router: bool, expert: int | None) -> Prices:
        """Prices behind `length` tokens, if the router reads and this expert answers (None: none reads)."""
        key = length // LENGTH_STEP, router, expert
        if self._priced == key:
            return self._prices
        costs = self.costs
        router_seconds = seconds_by_tokens(costs.router, length, self.exact) if router else FREE
        expert_seconds = seconds_by_tokens(costs.experts[expert], length, self.exact) if expert is not None else FREE
        if costs.joint is not None and router and expert is not None:
            reading, verifying = (seconds_by_tokens(passes, length, self.exact) for passes in costs.joint)
            plain, miss = reading[1], expert_seconds[1]
            drafted = [(rows - 1) * router_seconds[1] + seconds for rows, seconds in enumerate(verifying)]
        else:
            reading = [a + b for a, b in zip(router_seconds, expert_seconds, strict=True)]
            plain, miss = (max(router_seconds[1], expert_seconds[1]) if costs.concurrent else reading[1]), 0.0
            drafted = [rows * router_seconds[1] + seconds for rows, seconds in enumerate(expert_seconds)]
        self._priced, self._prices = key, Prices(plain, miss, reading, drafted, expert_seconds[1])
        return self._prices

    def saw(self, source: str, accepted: int, drafts: int) -> None:
        """Of `drafts` in a row the first `accepted` were accepted; those after the first refused one say nothing."""
        if drafts:
            self.rates[source].saw(accepted, min(accepted + 1, drafts))

    def produced(self, tokens: int, switched: int, missed: bool) -> None:
        """`tokens` were committed, `switched` of them by another expert than the token before.

        `missed`: the first one by another expert than was guessed.
        """
        self.switches.saw(switched, tokens)
        self.misses.saw(missed, 1)
