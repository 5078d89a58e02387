"""Options that several verbs have, each declared once."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import typer

from fusionroute.runtime.backends import KNOWN


def one_of(what: str, choices: Iterable[str]) -> Callable[[str | None], str | None]:
    """A callback that refuses an option's value which is none of the choices, with status 2.

    For choices that a table gives, such as the devices. Where they are fixed, the option's type is a Literal.
    """

    def check(value: str | None) -> str | None:
        if value is not None and value not in choices:
            raise typer.BadParameter(f"unknown {what} '{value}'; expected {', '.join(choices)}")
        return value

    return check


def in_bytes(mebibytes: int | None) -> int | None:
    """What an option in MiB is in bytes."""
    return None if mebibytes is None else mebibytes << 20


def names(text: str) -> tuple[str, ...]:
    """The names in a comma list, each once, in order."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",")))


BundleFolder = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of the bundle, as the exporter wrote it.")]
NewFolder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the bundle; it must not exist yet, or be empty.")]
PrecisionName = Annotated[str | None, typer.Option(help="Default: the fastest in the bundle.")]
Device = Annotated[str, typer.Option(help=f"{', '.join(KNOWN)}.", callback=one_of("device", KNOWN))]
VerifyKey = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Public key in PEM: refuse the bundle unless its owner signed it, and all files are those that were signed."
    ),
]
Trust = Annotated[bool, typer.Option("--trust", help="A bundle of your own: do not try its tokenizer in another process first.")]
ExpertMemory = Annotated[
    int | None, typer.Option(min=1, help="MiB for the experts' weights where they run: the least recently used make room.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, all else on stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
