"""What a graph file may hold, read from its bytes without the package onnx: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto.

The exporter writes flat graphs, in which a condition may choose between flat branches. Anything else could make loading, or
a single step, endless: functions that call each other double the graph at each level, and loops run as often as a number
in the file says.
"""

from __future__ import annotations

from fusionroute.runtime.wire import NUMBER, Field, fields

ORT_FORMAT = b"ORTM"  # at byte 4 of files in ONNX Runtime's own format, which it tells by that from ONNX
FOREIGN_OPERATORS = {b"EPContext"}  # nodes that name files of native code

GRAPH, TRAINING, FUNCTIONS = 7, 20, 25  # of ModelProto
BRANCHING = b"If"  # the operator whose subgraphs run once at most
NODE, INITIALIZER, SPARSE_INITIALIZER = 1, 5, 15  # of GraphProto
OPERATOR, ATTRIBUTE = 4, 5  # of NodeProto
TENSOR, SUBGRAPH, TENSORS, SUBGRAPHS, SPARSE, SPARSES = 5, 6, 10, 11, 22, 23  # of AttributeProto
EXTERNAL = 13  # of TensorProto


def external_files(content: bytes) -> set[str]:
    """The locations of the weights that a graph names, relative to its folder.

    Raises ValueError for what is no ONNX file, and for local functions, subgraphs and nodes that name native code.
    """
    if content[4:8] == ORT_FORMAT:
        raise ValueError("it is no ONNX file")
    locations: set[str] = set()
    for field, start, end in fields(content, 0, len(content)):
        if field in (FUNCTIONS, TRAINING):
            raise ValueError("it has local functions, which may make loading it endless")
        if field == GRAPH:
            _graph(content, start, end, locations, may_branch=True)
    return locations


def _graph(content: bytes, start: int, end: int, locations: set[str], may_branch: bool) -> None:
    for part in fields(content, start, end):
        if part[0] == NODE:
            _node(content, part, locations, may_branch)
        elif part[0] == INITIALIZER:
            _tensor(content, part, locations)
        elif part[0] == SPARSE_INITIALIZER:
            _sparse(content, part, locations)


def _node(content: bytes, node: Field, locations: set[str], may_branch: bool) -> None:
    parts = list(fields(content, *node[1:]))
    operators = {content[start:end] for field, start, end in parts if field == OPERATOR and end != NUMBER}
    if operators & FOREIGN_OPERATORS:
        raise ValueError("it has nodes of native code")
    for field, start, end in parts:
        if field == ATTRIBUTE:
            for part in fields(content, start, end):
                if part[0] == SUBGRAPH and may_branch and operators == {BRANCHING}:
                    _graph(content, *part[1:], locations, may_branch=False)
                elif part[0] in (SUBGRAPH, SUBGRAPHS):
                    raise ValueError("it has subgraphs, such as those of loops, which may make a step endless")
                if part[0] in (TENSOR, TENSORS):
                    _tensor(content, part, locations)
                elif part[0] in (SPARSE, SPARSES):
                    _sparse(content, part, locations)


def _sparse(content: bytes, tensor: Field, locations: set[str]) -> None:
    for part in fields(content, *tensor[1:]):
        if part[2] != NUMBER:  # its values, and their indices
            _tensor(content, part, locations)


def _tensor(content: bytes, tensor: Field, locations: set[str]) -> None:
    for field, start, end in fields(content, *tensor[1:]):
        if field == EXTERNAL:
            entry = {inner: content[first:last] for inner, first, last in fields(content, start, end)}
            if entry.get(1) == b"location":
                locations.add(entry.get(2, b"").decode())
