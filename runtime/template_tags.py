"""{% generation %} of chat templates: marks what an assistant wrote, for training; here it only renders what is in it."""

from __future__ import annotations

from collections.abc import Callable

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser


class Generation(Extension):
    """A block with names of its own, as transformers makes it."""

    tags = {"generation"}  # noqa: RUF012 Jinja declares it of instances

    def parse(self, parser: Parser) -> nodes.CallBlock:
        """See `jinja2.ext`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("written"), [], [], body, lineno=line)

    def written(self, caller: Callable[[], str]) -> str:
        """What the block renders."""
        return caller()
