"""What commands print: text that others wrote is never markup and moves no cursor, on consoles of any encoding."""

import json
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from fusionroute.runtime.errors import printable


class Terminal(Console):
    """A console that prints texts as they are, their control characters spelled out."""

    def __init__(self, **options: Any):
        super().__init__(**({"highlight": False, "markup": False} | options))

    def print(self, *objects: Any, **options: Any) -> None:
        """See `rich.console.Console.print`."""
        super().print(*map(spelled, objects), **options)


def spelled(value: Any) -> Any:
    """A text, styled or not, with control characters spelled out; anything else as it is."""
    if isinstance(value, Text):
        return value if lines(value.plain) == value.plain else Text(lines(value.plain), value.style)
    return lines(value) if isinstance(value, str) else value


def lines(text: str) -> str:
    """A text of several lines, with control characters spelled out."""
    return "\n".join(printable(line) for line in text.split("\n"))


def streamed(text: str) -> str:
    """A piece of a text as a terminal may show it: line ends and tabs, and no other control characters."""
    return "".join(each if each in "\n\t" or ord(each) >= 160 or each.isprintable() else printable(each) for each in text)


def print_json(value: object) -> None:
    """Print one line of JSON, in ASCII where stdout is not in UTF-8."""
    unicode = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
    print(json.dumps(value, ensure_ascii=not unicode), flush=True)


def spell_out() -> None:
    """Let stdout and stderr spell out what their encoding does not have, instead of raising UnicodeEncodeError."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):  # not where a test or a host has put its own
            reconfigure(errors="backslashreplace")
