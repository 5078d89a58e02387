"""The JSON schema of a Python function, of its signature and its docstring, as `get_json_schema` of transformers makes it.

https://huggingface.co/docs/transformers/chat_extras: every argument has a type hint, and a description under "Args:".
"""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Callable
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fusionroute.runtime.arguments import shown
from fusionroute.runtime.errors import InputError, one_line

SCALARS = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
OTHERS = {list: "array", tuple: "array", dict: "object"}
ARGUMENT = re.compile(r"([ \t]*)(\w+)(?:[ \t]*\([^()\n]*\))?:\s*(.*)")  # "name: text", or "name (type): text"
CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)  # at the end of a description


def schema_of(function: Callable[..., Any]) -> dict[str, Any]:
    """A tool for chat templates: {"type": "function", "function": {"name", "description", "parameters"}}, "return" too
    where it has a hint. Of a method, `self` or `cls` without a hint is no argument.

    Raises InputError where the docstring, a type hint or a description is missing, or a hint has no JSON schema.
    """
    name = getattr(function, "__name__", "operation")
    if not (text := inspect.getdoc(function)):
        raise InputError(f"The tool {name} has no docstring, which must describe it and its arguments: write one, or pass its JSON schema.")
    description, descriptions, returned = sections(text.strip())
    properties: dict[str, Any] = {}
    arguments = arguments_of(function)
    hints = hints_of(function, name)
    for argument in arguments:
        if argument not in hints:
            raise InputError(f"The argument {argument} of the tool {name} has no type hint: add one, or pass its JSON schema.")
        if argument not in descriptions:
            raise InputError(
                f"The docstring of the tool {name} has no line '{argument}: …' under 'Args:': add one, or pass its JSON schema."
            )
        try:
            properties[argument] = schema_of_hint(hints[argument]) | described(descriptions[argument])
        except ValueError as error:
            raise InputError(
                f"The argument {argument} of the tool {name} has no JSON schema ({one_line(error)}): change it, or pass its JSON schema."
            ) from error
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required := [argument for argument, parameter in arguments.items() if parameter.default is inspect.Parameter.empty]:
        parameters["required"] = required
    schema: dict[str, Any] = {"name": name, "description": description, "parameters": parameters}
    if (result := schema_of_result(hints)) is not None:
        schema["return"] = result if returned is None else result | {"description": returned}
    return {"type": "function", "function": schema}


def arguments_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The arguments that a caller gives, by name."""
    parameters = dict(inspect.signature(function).parameters)
    first = next(iter(parameters), None)
    if first in ("self", "cls") and parameters[first].annotation is inspect.Parameter.empty:
        del parameters[first]
    return parameters


def hints_of(function: Callable[..., Any], name: str) -> dict[str, Any]:
    """Type hints by argument, and that of the result as "return". Raises InputError for names that Python does not find."""
    try:
        return get_type_hints(function)
    except (NameError, TypeError) as error:
        raise InputError(
            f"The type hints of the tool {name} cannot be read ({one_line(error)}): mend them, or pass its JSON schema."
        ) from error


def schema_of_result(hints: dict[str, Any]) -> dict[str, Any] | None:
    """None without a hint, and for one without a schema: models do not write results."""
    try:
        return schema_of_hint(hints["return"])
    except (KeyError, ValueError):
        return None


def schema_of_hint(hint: Any) -> dict[str, Any]:
    """The JSON schema of a type hint. Raises ValueError where it has none."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if hint in SCALARS or hint in OTHERS:
        return {"type": (SCALARS | OTHERS)[hint]}
    if isinstance(hint, type) and issubclass(hint, Enum):
        return schema_of_values([member.value for member in hint])
    if origin is Literal:
        return schema_of_values(list(parts))
    if origin in (Union, types.UnionType):
        return schema_of_union(parts)
    if origin is list:
        return {"type": "array"} | ({"items": schema_of_hint(parts[0])} if parts else {})
    if origin is tuple and len(parts) != 1 and ... not in parts:
        return {"type": "array"} | ({"prefixItems": [schema_of_hint(part) for part in parts]} if parts else {})
    if origin is dict:
        return {"type": "object"} | ({"additionalProperties": schema_of_hint(parts[1])} if parts else {})
    raise ValueError(f"the type {shown(hint)}")


def schema_of_values(values: list[Any]) -> dict[str, Any]:
    """Of values to choose from. Raises ValueError for none, and for what JSON does not have."""
    if not values or any(type(value) not in SCALARS for value in values):
        raise ValueError(f"the choice of {shown(values)}")
    kinds = list(dict.fromkeys(SCALARS[type(value)] for value in values))
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": values}


def schema_of_union(parts: tuple[Any, ...]) -> dict[str, Any]:
    """Of several types; with None among them it is nullable. Raises ValueError."""
    schemas = [schema_of_hint(part) for part in parts if part is not type(None)]
    if len(schemas) == 1:
        union = schemas[0]
    elif all(schema.keys() == {"type"} and isinstance(schema["type"], str) for schema in schemas):
        kinds = sorted({schema["type"] for schema in schemas})
        union = {"type": kinds[0] if len(kinds) == 1 else kinds}
    else:
        union = {"anyOf": schemas}
    return union | ({"nullable": True} if type(None) in parts else {})


def described(text: str) -> dict[str, Any]:
    """A description, and the values in its "(choices: [...])". Raises ValueError where those are no JSON list."""
    if (choices := CHOICES.search(text)) is None:
        return {"description": text}
    values = json.loads(choices.group(1))
    if not isinstance(values, list):
        raise ValueError(f"the choice of {shown(values)}")
    return {
        "enum": [value.strip() if isinstance(value, str) else value for value in values],
        "description": text[: choices.start()].strip(),
    }


def sections(text: str) -> tuple[str, dict[str, str], str | None]:
    """What a docstring in Google's style says: of the function, of each argument, and of the result, None where it does not."""
    description = re.split(r"\s*(?:Args:|Returns:|Raises:)", text, maxsplit=1)[0].strip()
    arguments = re.search(r"\n\s*Args:\n(.*?)\s*(?:Returns:|Raises:|\Z)", text, re.DOTALL)
    result = re.search(r"\n\s*Returns:\n\s*(.*?)\s*(?:Raises:|\Z)", text, re.DOTALL)
    return description, entries(arguments.group(1)) if arguments else {}, result.group(1) if result else None


def entries(section: str) -> dict[str, str]:
    """The descriptions in a section, by argument. Lines that lie deeper, or begin no entry, go on with the one before."""
    texts: dict[str, list[str]] = {}
    name = indent = ""
    for line in filter(str.strip, section.split("\n")):
        entry = ARGUMENT.match(line)
        deeper = line.startswith((indent + " ", indent + "\t"))
        if entry is not None and (not name or (any(texts[name]) and not deeper)):
            indent, name = entry.group(1), entry.group(2)
            texts[name] = [entry.group(3).strip()]
        elif name:
            texts[name].append(line.strip())
    return {name: " ".join(filter(None, lines)) for name, lines in texts.items()}
