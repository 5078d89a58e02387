"""What a generated text must look like: JSON, a regular expression, or a grammar in Lark's notation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fusionroute.runtime.arguments import shown, text
from fusionroute.runtime.errors import InputError, one_line

MOST_SOURCE = 1 << 20  # characters


@dataclass(frozen=True)
class Grammar:
    """Pass one as `grammar=` to `FusionRuntime.generate`. It is compiled, and refused where it is wrong, there.

    kind: "json_schema", "regex" or "lark". source: the schema as JSON, the expression, or the grammar.
    """

    kind: str
    source: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | str) -> Grammar:
        """JSON that is valid by a schema, given as a dict or as JSON. Raises InputError for what is neither.

        Whitespace is at most one space, or one line end with indentation, so that no model writes it for ever.
        """
        content: object = schema
        if isinstance(schema, str):
            try:
                content = json.loads(_bounded(schema))
            except (ValueError, RecursionError) as error:
                raise InputError(f"The JSON schema is no JSON ({one_line(error)}): pass a dict, or a str of JSON.") from error
        if not isinstance(content, (Mapping, bool)):
            raise InputError(f"The JSON schema is {shown(content)}, expected a dict, or a str of JSON.")
        try:
            return cls("json_schema", _bounded(json.dumps(content, allow_nan=False)))
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"The JSON schema cannot be written as JSON ({one_line(error)}): pass one that can.") from error

    @classmethod
    def json_object(cls) -> Grammar:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """A text that an expression matches as a whole, in the syntax of Rust's `regex`: no look-around, no references.

        Raises InputError for what is no str.
        """
        return cls("regex", _bounded(text("The expression", pattern)))

    @classmethod
    def lark(cls, grammar: str) -> Grammar:
        """A text that `start` of a context-free grammar derives, in Lark's notation. Raises InputError for what is no str."""
        return cls("lark", _bounded(text("The grammar", grammar)))


def _bounded(source: str) -> str:
    if len(source) > MOST_SOURCE:
        raise InputError(f"The grammar has {len(source)} characters, expected at most {MOST_SOURCE}.")
    return source
