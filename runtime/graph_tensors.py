"""The tensors in an ONNX file, read from its bytes: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto.

The runtime does without the package onnx, and ONNX Runtime tells of inputs and outputs alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

VARINT, EIGHT, BYTES, FOUR = 0, 1, 2, 5  # wire types of protocol buffers
GRAPH = 7  # of ModelProto
NODE, INITIALIZER = 1, 5  # of GraphProto
INPUT, OPERATOR, ATTRIBUTE = 1, 4, 5  # of NodeProto
ATTRIBUTE_TENSOR = 5  # of AttributeProto
DIMS, TYPE, NAME, RAW, EXTERNAL = 1, 2, 8, 9, 13  # of TensorProto
KEY, VALUE = 1, 2  # of StringStringEntryProto
WIDTHS = {1: 4, 10: 2, 16: 2}  # ONNX's numbers of float32, float16 and bfloat16 → bytes of a value
ROTARY_TABLES = {"GroupQueryAttention": 7, "RotaryEmbedding": 2}  # operator → the input that holds cosines, a row a position

Field = tuple[int, int | memoryview]  # its number, and a number or its bytes


class GraphTensor(NamedTuple):
    """An initialiser or a constant. type: ONNX's number. data: its bytes, None where they lie in the file `location`."""

    name: str
    type: int
    dims: tuple[int, ...]
    data: memoryview | None
    location: str = ""
    offset: int = 0

    @property
    def bytes(self) -> int:
        """Of a tensor of floats; of others 0."""
        return WIDTHS.get(self.type, 0) * math.prod(self.dims)


def tensors(content: bytes) -> Iterator[GraphTensor]:
    """The initialisers and constants of a graph. Raises ValueError for what is no ONNX file."""
    for kind, part in graph(content):
        if kind == INITIALIZER:
            yield tensor(part)
        elif kind == NODE:
            for attribute in messages(part, ATTRIBUTE):
                yield from map(tensor, messages(attribute, ATTRIBUTE_TENSOR))


def positions(content: bytes) -> int | None:
    """For how many positions the rotary tables of a graph's operators have rows; None where no operator has one.

    Raises ValueError for what is no ONNX file.
    """
    dims: dict[str, tuple[int, ...]] = {}
    tables: set[str] = set()
    for kind, part in graph(content):
        if kind == INITIALIZER:
            each = tensor(part)
            dims[each.name] = each.dims
        elif kind == NODE:
            operator = next((text(value) for value in messages(part, OPERATOR)), "")
            inputs = [text(value) for value in messages(part, INPUT)]
            place = ROTARY_TABLES.get(operator, len(inputs))
            tables.update(inputs[place : place + 1])
    return min((dims[name][0] for name in tables if dims.get(name)), default=None)


def graph(content: bytes) -> Iterator[tuple[int, memoryview]]:
    """The messages of a file's graph: the field's number, and its bytes."""
    for own in messages(memoryview(content), GRAPH):
        for number, value in fields(own):
            if isinstance(value, memoryview):
                yield number, value


def tensor(message: memoryview) -> GraphTensor:
    """One TensorProto. Raises ValueError."""
    dims: list[int] = []
    name, kind, data, external = "", 0, None, dict[str, str]()
    for number, value in fields(message):
        if number == DIMS:
            dims += [value] if isinstance(value, int) else numbers(value)
        elif number == TYPE and isinstance(value, int):
            kind = value
        elif isinstance(value, memoryview) and number in (NAME, RAW, EXTERNAL):
            if number == NAME:
                name = text(value)
            elif number == RAW:
                data = value
            else:
                entry: Mapping[int, str] = {key: text(part) for key, part in fields(value) if isinstance(part, memoryview)}
                external[entry.get(KEY, "")] = entry.get(VALUE, "")
    return GraphTensor(name, kind, tuple(dims), data, external.get("location", ""), int(external.get("offset", "0")))


def text(value: memoryview) -> str:
    """A string of a message. Raises ValueError."""
    return bytes(value).decode()


def messages(message: memoryview, number: int) -> Iterator[memoryview]:
    """The values of one field that are bytes."""
    return (value for field, value in fields(message) if field == number and isinstance(value, memoryview))


def fields(message: memoryview) -> Iterator[Field]:
    """The fields of a message. Raises ValueError where its bytes are none."""
    place = 0
    while place < len(message):
        tag, place = varint(message, place)
        kind = tag & 7
        if kind == VARINT:
            value, place = varint(message, place)
            yield tag >> 3, value
        elif kind == BYTES:
            length, place = varint(message, place)
            if place + length > len(message):
                raise ValueError("it is cut off")
            yield tag >> 3, message[place : place + length]
            place += length
        elif kind in (EIGHT, FOUR):
            place += 8 if kind == EIGHT else 4
        else:
            raise ValueError("it is no ONNX file")


def numbers(packed: memoryview) -> list[int]:
    """The numbers of a packed field."""
    place, listed = 0, []
    while place < len(packed):
        value, place = varint(packed, place)
        listed.append(value)
    return listed


def varint(message: memoryview, place: int) -> tuple[int, int]:
    """A number that begins at a byte, and where the next begins. Raises ValueError."""
    value = shift = 0
    while place < len(message) and shift < 70:
        byte = message[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7
    raise ValueError("it is cut off")
