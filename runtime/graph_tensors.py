"""The tensors in an ONNX file, read from its bytes: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto.

The runtime does without the package onnx, and ONNX Runtime tells of inputs and outputs alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from fusionroute.runtime.wire import NUMBER, Field, fields, numbers

GRAPH = 7  # of ModelProto
NODE, INITIALIZER = 1, 5  # of GraphProto
INPUT, OPERATOR, ATTRIBUTE = 1, 4, 5  # of NodeProto
ATTRIBUTE_TENSOR, ATTRIBUTE_GRAPH = 5, 6  # of AttributeProto
DIMS, TYPE, NAME, RAW, EXTERNAL = 1, 2, 8, 9, 13  # of TensorProto
KEY, VALUE = 1, 2  # of StringStringEntryProto
WIDTHS = {1: 4, 10: 2, 16: 2}  # ONNX's numbers of float32, float16 and bfloat16 → bytes of a value
ROTARY_TABLES = {"GroupQueryAttention": 7, "RotaryEmbedding": 2}  # operator → the input that holds cosines, a row a position


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
    for part in graph(content):
        if part[0] == INITIALIZER:
            yield tensor(content, part)
        elif part[0] == NODE:
            for attribute in inside(content, part, ATTRIBUTE):
                yield from (tensor(content, each) for each in inside(content, attribute, ATTRIBUTE_TENSOR))


def positions(content: bytes) -> int | None:
    """For how many positions the rotary tables of a graph's operators have rows; None where no operator has one.

    Raises ValueError for what is no ONNX file.
    """
    dims: dict[str, tuple[int, ...]] = {}
    tables: set[str] = set()
    for part in graph(content):
        if part[0] == INITIALIZER:
            each = tensor(content, part)
            dims[each.name] = each.dims
        elif part[0] == NODE:
            operator = next((text(content, each) for each in inside(content, part, OPERATOR)), "")
            inputs = [text(content, each) for each in inside(content, part, INPUT)]
            place = ROTARY_TABLES.get(operator, len(inputs))
            tables.update(inputs[place : place + 1])
    return min((dims[name][0] for name in tables if dims.get(name)), default=None)


def graph(content: bytes) -> Iterator[Field]:
    """The messages of a file's graph, and of the branches in it."""
    graphs = inside(content, (0, 0, len(content)), GRAPH)
    while graphs:
        for part in fields(content, *graphs.pop()[1:]):
            if part[2] == NUMBER:
                continue
            yield part
            if part[0] == NODE:
                graphs += [each for own in inside(content, part, ATTRIBUTE) for each in inside(content, own, ATTRIBUTE_GRAPH)]


def inside(content: bytes, message: Field, number: int) -> list[Field]:
    """The messages and strings of one field of a message."""
    return [part for part in fields(content, *message[1:]) if part[0] == number and part[2] != NUMBER]


def tensor(content: bytes, message: Field) -> GraphTensor:
    """One TensorProto. Raises ValueError."""
    dims: list[int] = []
    name, kind, data, external = "", 0, None, dict[str, str]()
    for part in fields(content, *message[1:]):
        number, start, end = part
        if end == NUMBER:
            dims += [start] if number == DIMS else []
            kind = start if number == TYPE else kind
        elif number == DIMS:
            dims += numbers(content, start, end)
        elif number == NAME:
            name = text(content, part)
        elif number == RAW:
            data = memoryview(content)[start:end]
        elif number == EXTERNAL:
            entry = {each[0]: text(content, each) for each in fields(content, start, end) if each[2] != NUMBER}
            external[entry.get(KEY, "")] = entry.get(VALUE, "")
    return GraphTensor(name, kind, tuple(dims), data, external.get("location", ""), int(external.get("offset", "0")))


def text(content: bytes, part: Field) -> str:
    """A string of a message. Raises ValueError."""
    return content[part[1] : part[2]].decode()
