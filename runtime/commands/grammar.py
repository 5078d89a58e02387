"""Options for what a text must look like."""

from pathlib import Path
from typing import Annotated

import typer

from fusionroute.runtime.errors import InputError, reason
from fusionroute.runtime.grammar import Grammar

JsonSchema = Annotated[Path | None, typer.Option(metavar="FILE", help="Generate JSON that is valid by the schema in this file.")]
Regex = Annotated[str | None, typer.Option(help="Generate a text that this expression matches as a whole.")]
Lark = Annotated[Path | None, typer.Option(metavar="FILE", help="Generate a text of the grammar in this file, in Lark's notation.")]


def read_grammar(json_schema: Path | None, regex: str | None, lark: Path | None) -> Grammar | None:
    """The one that is given, None without. Raises InputError for several, and for a file that cannot be read."""
    if sum(each is not None for each in (json_schema, regex, lark)) > 1:
        raise InputError("A text has one grammar: give one of --json-schema, --regex and --lark.")
    if json_schema is not None:
        return Grammar.json_schema(read(json_schema))
    if lark is not None:
        return Grammar.lark(read(lark))
    return None if regex is None else Grammar.regex(regex)


def read(file: Path) -> str:
    """A text file. Raises InputError."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read ({reason(error)}): name a text file in UTF-8.") from error
