"""Options that several of the exporter's verbs have, each declared once."""

from typing import Annotated

import typer

from fusionroute.fr_export.families import FAMILIES, Family

TAKEN = ("router", "fusion")


def parse_family(name: str) -> Family:
    """The family of a name."""
    if name not in FAMILIES:
        raise typer.BadParameter(f"unknown family '{name}'; expected {', '.join(FAMILIES)}", param_hint="--family")
    return FAMILIES[name]


def parse_expert(text: str) -> tuple[str, str]:
    """`NAME=SRC` → (name, source)."""
    name, equals, source = text.partition("=")
    if not (name and equals and source):
        raise typer.BadParameter(f"'{text}' is not NAME=SRC, such as --expert math=checkpoints/math", param_hint="--expert")
    if name in TAKEN:
        raise typer.BadParameter(
            f"'{name}' is what the bundle calls another of its graphs; give the expert another name", param_hint="--expert"
        )
    if not name.isidentifier():
        raise typer.BadParameter(
            f"the name '{name}' is not made of letters, digits and '_' alone, a letter or '_' first; expected NAME=SRC, such as "
            "--expert math=checkpoints/math",
            param_hint="--expert",
        )
    return name, source


def parse_experts(texts: list[str]) -> list[tuple[str, str]]:
    """Every --expert flag's name and source, in order. The names differ."""
    experts = [parse_expert(text) for text in texts]
    if len({name for name, _ in experts}) < len(experts):
        raise typer.BadParameter("every expert needs a name of its own", param_hint="--expert")
    return experts


FamilyOption = Annotated[
    Family | None,
    typer.Option(
        parser=parse_family,
        metavar="FAMILY",
        help=f"Model family ({', '.join(FAMILIES)}); default: the one that the router's config names.",
    ),
]
ExpertOptions = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=SRC", help="A model or LoRA adapter; repeat per expert, in the order of the routing head's rows."),
]
BaseOption = Annotated[
    str | None, typer.Option(metavar="SRC", help="The model under all LoRA adapters; default: the one that each of them names.")
]
