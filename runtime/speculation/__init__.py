"""Lossless speculation: cheap guesses at the next tokens, verified several at a time by the models that would have chosen them."""

from fusionroute.runtime.speculation.costs import MOST, Costs, costs_of
from fusionroute.runtime.speculation.rounds import Rounds

__all__ = ["MOST", "Costs", "Rounds", "costs_of"]
