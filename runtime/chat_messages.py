"""Messages, tools and documents of a conversation as a chat template sees them: plain copies, made as transformers makes them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any, ClassVar, Protocol

import numpy as np

from fusionroute.runtime.arguments import UNORDERED_OR_TEXT, shown
from fusionroute.runtime.errors import InputError, one_line
from fusionroute.runtime.tool_schemas import schema_of

MOST_DEPTH = 64  # lists and dicts in each other
REASONING = ("reasoning_content", "thinking", "reasoning")  # names for one field; templates read either of the first two


class Dataclass(Protocol):
    """An instance of a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


class Model(Protocol):
    """A pydantic model, such as a message of OpenAI's client."""

    def model_dump(self) -> dict[str, Any]:
        """Its fields by name."""
        ...


Message = Mapping[str, Any] | Dataclass | Model


def plain_messages(messages: object) -> list[dict[str, Any]]:
    """Copies of messages: without fields that are None, and with the reasoning under both names that templates read.

    Raises InputError for what is no list of {"role": str, ...} with values that JSON has.
    """
    copies = []
    for number, message in enumerate(listed(messages), start=1):
        if (fields := fields_of(message)) is None:
            raise InputError(f'Message {number} is {type(message).__name__}, expected {{"role": ..., "content": ...}}.')
        copy = {key: value for key, value in plain(f"Message {number}", fields).items() if value is not None}
        if not isinstance(copy.get("role"), str):
            raise InputError(f'Message {number} has no "role": give it one, a str.')
        reasoning = next((copy[name] for name in REASONING if name in copy), None)
        copies.append(copy if reasoning is None else {"thinking": reasoning, **copy, "reasoning_content": reasoning})
    return copies


def listed(messages: object) -> list[Any]:
    """Raises InputError for no list, and for an empty one."""
    items = list(messages) if isinstance(messages, Iterable) and not isinstance(messages, UNORDERED_OR_TEXT) else []
    if not items:
        raise InputError('The messages are not a list with at least one {"role": ..., "content": ...}.')
    return items


def is_message(value: object) -> bool:
    """Whether `fields_of` finds fields."""
    return isinstance(value, Mapping) or (not isinstance(value, type) and (dataclasses.is_dataclass(value) or hasattr(value, "model_dump")))


def fields_of(value: object) -> Mapping[Any, Any] | None:
    """The fields of a mapping, a dataclass or a pydantic model; None for what has none. Raises InputError for a model that fails."""
    if isinstance(value, Mapping):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    dump = None if isinstance(value, type) else getattr(value, "model_dump", None)
    if not callable(dump):
        return None
    try:
        fields = dump()
    except Exception as error:  # code of the caller's
        raise InputError(f"{type(value).__name__} cannot be read by its model_dump ({one_line(error)}): pass a dict.") from error
    return fields if isinstance(fields, Mapping) else None


def plain_tools(tools: object) -> list[dict[str, Any]] | None:
    """Copies of the JSON schemas of tools, made of those that are functions; None where there are none. Raises InputError."""
    if tools is None or isinstance(tools, UNORDERED_OR_TEXT) or not isinstance(tools, Iterable):
        return plain_dicts("tools", tools)
    return plain_dicts("tools", [schema_of(tool) if inspect.isfunction(tool) or inspect.ismethod(tool) else tool for tool in tools])


def plain_dicts(name: str, values: object) -> list[dict[str, Any]] | None:
    """Copies of tools or documents, None where there are none. Raises InputError for what is no list of dicts."""
    if values is None:
        return None
    if isinstance(values, UNORDERED_OR_TEXT) or not isinstance(values, Iterable):
        raise InputError(f"{name} is {shown(values)}, expected a list of dicts, or None.")
    copies = []
    for number, value in enumerate(values):
        if not isinstance(value, Mapping):
            expected = "a dict with a JSON schema, or a function with type hints" if name == "tools" else "a dict"
            raise InputError(f"{name}[{number}] is {shown(value)}, expected {expected}.")
        copies.append(plain(f"{name}[{number}]", value))
    return copies


def plain(where: str, value: object, depth: int = 0) -> Any:
    """A copy of what JSON has, of exactly these types: templates see nothing else. Raises InputError, which says `where`."""
    if depth > MOST_DEPTH:
        raise InputError(f"{where} is nested more than {MOST_DEPTH} deep: make it flatter.")
    if value is None or isinstance(value, (bool, np.bool_)):
        return None if value is None else bool(value)
    if isinstance(value, str):
        return str.__str__(value)  # of subclasses, such as enums, the text
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise InputError(f"{where} has the key {shown(key)}, expected a str.")
        return {str.__str__(key): plain(f"{where}.{key}", each, depth + 1) for key, each in value.items()}
    if (fields := fields_of(value)) is not None:
        return plain(where, fields, depth)
    if isinstance(value, (list, tuple)):
        copies = [plain(f"{where}[{number}]", each, depth + 1) for number, each in enumerate(value)]
        return tuple(copies) if isinstance(value, tuple) else copies
    raise InputError(f"{where} is {shown(value)}, expected what JSON has: a str, a number, a bool, None, a list or a dict.")
