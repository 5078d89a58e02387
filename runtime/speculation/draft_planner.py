"""How far to draft ahead: what a draft costs on this machine, measured once, against the acceptance rate in this text.

Costs are measured at load and acceptance comes from the tokens, so that the choice, and with it every chunk's length, depends on no clock.
"""

from dataclasses import dataclass, field

from fusionroute.runtime.speculation.costs import MOST, Costs, table

FORGET = 0.97  # of the weight of what was seen, with every verified draft
PRIOR = {"router": (0.5, 1.0), "lookup": (0.5, 2.0)}  # acceptance rate before anything is seen, and how many drafts that belief is worth
GAIN = 1.1  # times as fast as plain decoding, or no drafts: costs are not known much better than that
SHORT = 1e-3  # seconds of a plain step below which nothing is drafted: planning and learning would take a tenth of it
GRAIN = 128  # tokens after which costs are looked up for the new length


@dataclass
class Rate:
    """A share of hits that forgets."""

    hits: float
    trials: float

    @property
    def mean(self) -> float:
        """Between 0 and 1."""
        return self.hits / self.trials

    def saw(self, hits: float, trials: int) -> None:
        """`hits` of `trials` drafts were accepted, or would have been."""
        keep = FORGET**trials
        self.hits, self.trials = self.hits * keep + hits, self.trials * keep + trials


@dataclass
class Plan:
    """Tokens to draft, and where from; rows = 1: none."""

    source: str
    rows: int


@dataclass
class Pace:
    """The choice for one text. `exact`: tokens are read by twos."""

    costs: Costs
    exact: bool = False
    rates: dict[str, Rate] = field(default_factory=lambda: {name: Rate(mean * weight, weight) for name, (mean, weight) in PRIOR.items()})
    switches: Rate = field(default_factory=lambda: Rate(0.5, 2.0))
    _priced: tuple[int, int] = (-1, -1)  # length in grains and expert that the tables are for
    _tables: tuple[list[float], list[float]] = field(default=([], []), init=False)

    @property
    def pays(self) -> bool:
        """Whether drafts can pay at all: steps are not so short that thinking about drafts takes longer than they can save."""
        expert = min((passes[0][0] for passes in self.costs.experts), default=0.0)
        return self.costs.beside or self.costs.router[0][0] + expert >= SHORT  # side by side, an expert's single pass is only queued

    def plan(self, most: int, looked_up: int, router: bool, expert: int | None, length: int) -> Plan:
        """The fastest way to go on behind `length` tokens, producing at most `most`, where the text offers `looked_up` drafts.

        `router` and `expert`: whether the router runs, and the expert that is likely to answer (None: none runs; the router's own drafts
        then verify nothing).
        """
        reads, answers = self._prices(length, expert or 0)
        reads, answers = reads if router else FREE, answers if expert is not None else FREE
        fusion, switching = self.costs.fusion, self.switches.mean * answers[1]
        plain = max(reads[1], answers[1]) if self.costs.beside else reads[1] + answers[1]
        best, fastest = Plan("router", 1), (plain + fusion) / GAIN
        offers = {"lookup": min(looked_up + 1, most, MOST), "router": min(most, MOST) if router and expert is not None else 1}
        for source, limit in offers.items():
            rate = self.rates[source].mean
            tokens = power = 1.0
            for rows in range(2, limit + 1):
                power *= rate
                tokens += power  # expected: 1 + a + a² + …
                drafting = rows * reads[1] if source == "router" else reads[rows]
                # experts that take turns within a round are read one after the other, as far as drafts hold
                seconds = (drafting + answers[rows] + switching * (tokens - 1)) / tokens + fusion
                if seconds < fastest:
                    best, fastest = Plan(source, rows), seconds
        return best

    def _prices(self, length: int, expert: int) -> tuple[list[float], list[float]]:
        """Seconds of the router's and of an expert's passes over 0 … MOST tokens."""
        if self._priced != (length // GRAIN, expert):
            self._priced = length // GRAIN, expert
            self._tables = table(self.costs.router, length, self.exact), table(self.costs.experts[expert], length, self.exact)
        return self._tables

    def saw(self, source: str, accepted: int, drafts: int) -> None:
        """Of `drafts` in a row the first `accepted` were accepted; those after the first refused one say nothing."""
        if drafts:
            self.rates[source].saw(accepted, min(accepted + 1, drafts))

    def produced(self, tokens: int, switched: int) -> None:
        """So many tokens were committed, so many of them by another expert than the one before."""
        self.switches.saw(switched, tokens)


FREE = [0.0] * (MOST + 1)
