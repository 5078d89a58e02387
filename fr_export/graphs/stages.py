"""Cut a traced graph into stages: each begins where a decoder block does, or where the input of a weight matrix, or of
several, is ready.

A matrix's input is a state of its stage, so it can be looked at without running anything, and its products with all
texts can be one.
"""

from collections.abc import Sequence

import onnx_ir as ir

from fusionroute.calibration.block import Block
from fusionroute.fr_export.graphs import decoder_blocks
from fusionroute.fr_export.graphs.decoder_blocks import build, embedding, is_product
from fusionroute.fr_export.graphs.graph import Graph


def stages(graph: Graph) -> list[Block]:
    """Of a graph as `trace` returns it: for each decoder block and for the final norm an opening, which has no product
    and takes what the block before passes on (at first the embedding rows), then one for each value that products read.

    The last one is named `head`: its state is the input of the LM head, whose product is left out. Raises FusionError
    as `decoder_blocks.split` does.
    """
    look_up = embedding(graph)
    blocks = decoder_blocks.place(graph, look_up)
    values = {node.inputs[0]: at for node, at in blocks.items() if is_product(graph, node)}
    begins = dict.fromkeys(begin for value, at in values.items() for begin in (at, value))
    number = {begin: where for where, begin in enumerate(begins)}  # of blocks and of the values that products read
    places: dict[ir.Node, int | None] = {}
    for node, at in blocks.items():
        places[node] = number[node.inputs[0]] if is_product(graph, node) else place(node, number.get(at, 0), look_up, places)
    last = len(begins) - 1
    live: list[list[ir.Value]] = [[] for _ in range(last + 1)]  # what enters each stage
    for value in (look_up.outputs[0], *(value for node in places for value in node.outputs)):
        start = 0 if value is look_up.outputs[0] else places[value.producer()]
        if start is not None:
            until = max((places[user] or 0 for user in value.consumers() if user is not look_up), default=start)
            for at in range(start + (value is not look_up.outputs[0]), min(until, last) + 1):
                live[at].append(value)
    head = list(values)[-1]
    live[last] = [head]
    observed: list[dict[str, ir.Value]] = [{} for _ in live]
    for node in places:
        if is_product(graph, node):
            observed[number[node.inputs[0]]][node.inputs[1].name] = node.inputs[0]
    parts: list[list[ir.Node]] = [[] for _ in range(last)]
    multiplied: list[list[ir.Node]] = [[] for _ in live]
    for node, where in places.items():
        if where is not None and is_product(graph, node):
            if where < last:
                multiplied[where].append(node)
            continue
        for at in range(last) if where is None else [where] if where < last else []:
            parts[at].append(node)
    names = [*(f"stage.{at}" for at in range(last)), "head"]
    return [
        build(graph, name, nodes, given, passed, seen, products, [value for node in nodes for value in caches_of(node)])
        for name, nodes, given, passed, seen, products in zip(
            names, [*parts, []], live, [*live[1:], [head]], observed, multiplied, strict=True
        )
    ]


def place(node: ir.Node, opening: int, look_up: ir.Node, places: dict[ir.Node, int | None]) -> int | None:
    """The stage of a node: of the newest value that it depends on, and no earlier than its block's opening; None where it
    depends on no token's state.
    """
    makers = [maker for value in node.inputs if value is not None and (maker := value.producer()) is not None]
    came = [0 if maker is look_up else places[maker] for maker in makers]
    before = [at for at in came if at is not None]
    return max(*before, opening) if before else None


def caches_of(node: ir.Node) -> Sequence[ir.Value]:
    """The keys and values that a node leaves behind."""
    return node.outputs[1:] if node.op_type == "GroupQueryAttention" else ()
