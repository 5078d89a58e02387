"""Lossless speculation: cheap guesses at the next tokens, verified several at a time by the models that would have chosen them."""

from runtime.speculation.costs import Costs, costs_of
from runtime.speculation.rounds import Rounds

__all__ = ["Costs", "Rounds", "costs_of"]
