"""Cut a traced graph into stages: each begins where the input of a weight matrix, or of several, is ready.

Finer than decoder blocks. A matrix's input is a state of its stage, so it can be looked at without running anything, and
its products with all texts can be one.
"""

import onnx_ir as ir

from fusionroute.calibration.blockwise_forward import Block
from fusionroute.fr_export.graphs.decoder_blocks import build, embedding, is_product, unique
from fusionroute.fr_export.graphs.graph import Graph


def stages(graph: Graph) -> list[Block]:
    """A stage for the embedding rows and one for each value that products read, of a graph as `trace` returns it.

    The last one is named `head`: its state is the input of the LM head, whose product is left out. Raises FusionError
    as `decoder_blocks.split` does.
    """
    look_up = embedding(graph)
    values = unique(node.inputs[0] for node in graph.model.graph if is_product(graph, node))
    number = {value: place for place, value in enumerate(values, 1)}
    places: dict[ir.Node, int | None] = {}
    for node in graph.model.graph:
        if node is not look_up:
            places[node] = place(graph, node, look_up, places, number)
    last = len(values)
    live: list[list[ir.Value]] = [[] for _ in range(last + 1)]  # what enters each stage
    for value in (look_up.outputs[0], *(value for node in places for value in node.outputs)):
        start = 0 if value is look_up.outputs[0] else places[value.producer()]
        if start is not None:
            until = max((places[user] or 0 for user in value.consumers() if user is not look_up), default=start)
            for at in range(start + (value is not look_up.outputs[0]), min(until, last) + 1):
                live[at].append(value)
    live[last] = [values[-1]]
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
        build(graph, name, nodes, given, passed, seen, products)
        for name, nodes, given, passed, seen, products in zip(
            names, [*parts, []], live, [*live[1:], [values[-1]]], observed, multiplied, strict=True
        )
    ]


def place(graph: Graph, node: ir.Node, look_up: ir.Node, places: dict[ir.Node, int | None], number: dict[ir.Value, int]) -> int | None:
    """The stage of a node: of the newest value that it depends on; None where it depends on no token's state."""
    if is_product(graph, node):
        return number[node.inputs[0]]
    makers = [maker for value in node.inputs if value is not None and (maker := value.producer()) is not None]
    came = [0 if maker is look_up else places[maker] for maker in makers]
    before = [at for at in came if at is not None]
    return max(before, default=None)
