"""How far to draft ahead: what a draft costs on this machine, measured once, against the acceptance rate in this text.

Costs are measured at load and acceptance comes from the tokens, so that the choice, and with it every chunk's length, depends on no clock.
"""

from dataclasses import dataclass, field

from runtime.speculation.costs import MOST, Costs

FORGET = 0.97  # of the weight of what was seen, with every verified draft
PRIOR = {"router": (0.7, 4.0), "lookup": (0.5, 2.0)}  # acceptance rate before anything is seen, and how many drafts that belief is worth
RETRY = 64  # tokens after which a source that does not seem to pay is tried again


@dataclass
class Rate:
    """An acceptance rate that forgets."""

    hits: float
    trials: float

    @property
    def mean(self) -> float:
        """Between 0 and 1."""
        return self.hits / self.trials

    def saw(self, hits: int, trials: int) -> None:
        """`hits` of `trials` drafts were accepted."""
        keep = FORGET**trials
        self.hits, self.trials = self.hits * keep + hits, self.trials * keep + trials


@dataclass
class Plan:
    """Tokens to draft, and where from; rows = 1: none."""

    source: str
    rows: int


@dataclass
class Pace:
    """The choice for one text."""

    costs: Costs
    rates: dict[str, Rate] = field(default_factory=lambda: {name: Rate(mean * weight, weight) for name, (mean, weight) in PRIOR.items()})
    switches: Rate = field(default_factory=lambda: Rate(0.5, 4.0))
    since: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PRIOR, 0))  # tokens since a source was last used

    def plan(self, most: int, looked_up: int, router: bool, expert: bool) -> Plan:
        """The fastest way to go on, producing at most `most` tokens, where the text offers `looked_up` drafts.

        `router` and `expert`: which of them run. Without an expert the router's own drafts verify nothing.
        """
        best, fastest = Plan("router", 1), self.seconds("router", 1, router, expert)
        offers = {"lookup": min(looked_up + 1, most, MOST), "router": min(most, MOST) if router and expert else 1}
        for source, limit in offers.items():
            for rows in range(2, limit + 1):
                seconds = self.seconds(source, rows, router, expert) / self.tokens(source, rows)
                if seconds < fastest:
                    best, fastest = Plan(source, rows), seconds
        if best.rows == 1:
            for source, limit in offers.items():
                if self.since[source] >= RETRY and limit > 1:
                    return Plan(source, 2)
        return best

    def tokens(self, source: str, rows: int) -> float:
        """Expected tokens of a round with so many rows: 1 + a + a² + …"""
        rate = self.rates[source].mean
        return sum(rate**row for row in range(rows))

    def seconds(self, source: str, rows: int, router: bool, expert: bool) -> float:
        """Expected time of a round. Experts that take turns within it are read one after the other, as far as drafts hold."""
        costs, tokens = self.costs, self.tokens(source, rows)
        drafting = rows * costs.router[0] if source == "router" else costs.of_router(rows)
        more = self.switches.mean * (tokens - 1)
        return (drafting if router else 0.0) + (costs.of_expert(rows) + more * costs.expert[0] if expert else 0.0) + tokens * costs.fusion

    def saw(self, source: str, accepted: int, drafts: int) -> None:
        """Of `drafts` in a row the first `accepted` were accepted; those after the first refused one say nothing."""
        if drafts:
            self.rates[source].saw(accepted, min(accepted + 1, drafts))
            self.since[source] = 0

    def produced(self, tokens: int, switched: int) -> None:
        """So many tokens were committed, so many of them by another expert than the one before."""
        self.switches.saw(switched, tokens)
        for source in self.since:
            self.since[source] += tokens
