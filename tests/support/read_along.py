"""Passes in which all experts read, whether that pays or not. Needs no torch."""

import pytest

from fusionroute.runtime.read_along import PassPrices
from fusionroute.runtime.speculation import pass_prices

ALWAYS = PassPrices(pair=1.0, every=1.0, alone=1.0, experts=3)  # reading along costs nothing
NEVER = PassPrices(pair=1.0, every=9.0, alone=1.0, experts=3)


def priced(monkeypatch: pytest.MonkeyPatch, prices: PassPrices) -> None:
    """Let runtimes that are loaded from now on know these prices."""
    monkeypatch.setattr(pass_prices, "prices_of", lambda *_: prices)
