"""What a graph file may hold, read from its bytes without the package onnx: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto.

The exporter writes flat graphs. Anything else could make loading, or a single step, endless: functions that call each
other double the graph at each level, and loops run as often as a number in the file says.
"""

from __future__ import annotations

ORT_FORMAT = b"ORTM"  # at byte 4 of files in ONNX Runtime's own format, which it tells by that from ONNX
BYTES, VARINT, EIGHT, FOUR = 2, 0, 1, 5  # wire types of protocol buffers
FOREIGN_OPERATORS = {b"EPContext"}  # nodes that name files of native code

GRAPH, TRAINING, FUNCTIONS = 7, 20, 25  # of ModelProto
NODE, INITIALIZER, SPARSE_INITIALIZER = 1, 5, 15  # of GraphProto
OPERATOR, ATTRIBUTE = 4, 5  # of NodeProto
TENSOR, SUBGRAPH, TENSORS, SUBGRAPHS, SPARSE, SPARSES = 5, 6, 10, 11, 22, 23  # of AttributeProto
EXTERNAL = 13  # of TensorProto


Part = tuple[int, int, int]  # of a message: a field's number, where its content begins, and where it ends


def external_files(content: bytes) -> set[str]:
    """The locations of the weights that a graph names, relative to its folder.

    Raises ValueError for what is no ONNX file, and for local functions, subgraphs and nodes that name native code.
    """
    if content[4:8] == ORT_FORMAT:
        raise ValueError("it is no ONNX file")
    locations: set[str] = set()
    for field, start, end in parts(content, 0, len(content)):
        if field in (FUNCTIONS, TRAINING):
            raise ValueError("it has local functions, which may make loading it endless")
        if field == GRAPH:
            for part in parts(content, start, end):
                if part[0] == NODE:
                    _node(content, part, locations)
                elif part[0] == INITIALIZER:
                    _tensor(content, part, locations)
                elif part[0] == SPARSE_INITIALIZER:
                    _sparse(content, part, locations)
    return locations


def _node(content: bytes, node: Part, locations: set[str]) -> None:
    for field, start, end in parts(content, *node[1:]):
        if field == OPERATOR and content[start:end] in FOREIGN_OPERATORS:
            raise ValueError("it has nodes of native code")
        if field == ATTRIBUTE:
            for part in parts(content, start, end):
                if part[0] in (SUBGRAPH, SUBGRAPHS):
                    raise ValueError("it has subgraphs, such as those of loops, which may make a step endless")
                if part[0] in (TENSOR, TENSORS):
                    _tensor(content, part, locations)
                elif part[0] in (SPARSE, SPARSES):
                    _sparse(content, part, locations)


def _sparse(content: bytes, tensor: Part, locations: set[str]) -> None:
    for part in parts(content, *tensor[1:]):  # its values, and their indices
        _tensor(content, part, locations)


def _tensor(content: bytes, tensor: Part, locations: set[str]) -> None:
    for field, start, end in parts(content, *tensor[1:]):
        if field == EXTERNAL:
            entry = {inner: content[first:last] for inner, first, last in parts(content, start, end)}
            if entry.get(1) == b"location":
                locations.add(entry.get(2, b"").decode())


def parts(content: bytes, place: int, end: int) -> list[Part]:
    """The fields that have a length of the message that lies between two bytes; the others are passed over.

    Raises ValueError where the bytes are no message.
    """
    listed = []
    while place < end:
        tag = content[place]
        place += 1
        if tag > 127:
            tag, place = varint(content, place - 1)
        kind = tag & 7
        if kind == BYTES:
            length = content[place] if place < end else 0
            place += 1
            if length > 127:
                length, place = varint(content, place - 1)
            listed.append((tag >> 3, place, place + length))
            place += length
        elif kind == VARINT:
            _, place = varint(content, place)
        elif kind in (EIGHT, FOUR):
            place += 8 if kind == EIGHT else 4
        else:
            raise ValueError("it is no ONNX file")
    if place > end:
        raise ValueError("it is cut off")
    return listed


def varint(content: bytes, place: int) -> tuple[int, int]:
    """A number that begins at a byte, and where the next begins. Raises ValueError."""
    value = shift = 0
    while place < len(content) and shift < 70:
        byte = content[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7
    raise ValueError("it is cut off")
