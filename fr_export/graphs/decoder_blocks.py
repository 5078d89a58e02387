"""Cut a traced graph into its decoder blocks, to run it with one block's weights in memory."""

import math
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import onnx_ir as ir

from fusionroute.calibration.block import Block
from fusionroute.fr_export.checkpoints.weights import Weights
from fusionroute.fr_export.graphs.graph import INLINE, Graph, Source
from fusionroute.fr_export.graphs.source_rows import rows
from fusionroute.runtime.errors import FusionError

LAYER = re.compile(r"^.*\blayers\.(\d+)\.")  # of a weight: model.layers.3.mlp.down_proj.weight
PAST = re.compile(r"^past\.(\d+)\.")  # of a cache: past.3.key


def split(graph: Graph) -> list[Block]:
    """One block per decoder layer and one for the final norm, of a graph as `trace` returns it.

    A node belongs to the layer whose weights it reads, one without weights to where its inputs come from. What depends
    on no layer (positions, rotary angles) is repeated in each block. The embedding look-up is left out: its rows are
    the first block's state. Raises FusionError where a value flows backwards or past a block.
    """
    look_up = embedding(graph)
    places = place(graph, look_up)
    # states[b] enter block b: made in the block before it, used in it
    states: list[list[ir.Value]] = [[look_up.outputs[0]], *([] for _ in range(graph.layers + 1))]
    observed: list[dict[str, ir.Value]] = [{} for _ in range(graph.layers + 1)]
    for node, at in places.items():
        if at is None:
            continue
        for value in node.outputs:
            users = {places[user] for user in value.consumers()} - {at}
            if users - {at + 1}:
                raise FusionError(
                    f"The traced value '{value.name}' of layer {at} is used beyond layer {at + 1}; blocks cannot be cut here."
                )
            if users:
                states[at + 1].append(value)
        if is_product(graph, node):
            observed[at][node.inputs[1].name] = node.inputs[0]
    states[-1] = unique(observed[-1].values())  # the head ends where the product of the LM head begins
    names = [*(f"layers.{number}" for number in range(graph.layers)), "head"]
    return [
        build(
            graph,
            name,
            [n for part in (None, at) for n, where in places.items() if where == part],
            states[at],
            states[at + 1],
            observed[at],
        )
        for at, name in enumerate(names)
    ]


def reader(graph: Graph, weights: Weights) -> tuple[Callable[[np.ndarray], np.ndarray], Callable[[str], np.ndarray]]:
    """A BlockwiseForward's `embed` and `read`.

    `embed`: ids [S] → float32 [1, S, H], reads these rows only. `read`: name of a weight in the graph → float32. Both
    raise InputError as `Weights` does.
    """
    table = graph.sources[embedding(graph).inputs[0].name]

    def embed(ids: np.ndarray) -> np.ndarray:
        return weights.take(table.tensors[0], ids, table.rows)[None]

    def read(name: str) -> np.ndarray:
        source = graph.sources[name]
        if source.constant is not None:
            return source.constant
        whole = np.empty([int(size) for size in graph.model.graph.initializers[name].shape], np.float32)
        start = 0
        for part in rows(source, weights):
            whole[start : start + len(part)] = part
            start += len(part)
        return whole

    return embed, read


def matrices(graph: Graph) -> dict[str, int]:
    """Every weight matrix [out, in] that a product reads, in the graph's order → the channels of its input."""
    return {node.inputs[1].name: int(node.inputs[1].shape[1]) for node in graph.model.graph if is_product(graph, node)}


def is_product(graph: Graph, node: ir.Node) -> bool:
    """Whether a node is a linear layer's product with a weight."""
    return node.op_type == "FusedMatMul" and node.inputs[1].name in graph.sources


def embedding(graph: Graph) -> ir.Node:
    """The node that looks up the tokens' embedding rows."""
    ids = graph.model.graph.inputs[0]
    lookups = [user for user in ids.consumers() if user.op_type == "Gather" and user.inputs[1] is ids]
    if len(lookups) != 1:
        raise FusionError(f"The traced graph looks up its embedding {len(lookups)} times; expected once: this architecture cannot be cut.")
    return lookups[0]


def place(graph: Graph, look_up: ir.Node) -> dict[ir.Node, int | None]:
    """The block of every node but the look-up, in the graph's order; None where it depends on no layer."""
    places: dict[ir.Node, int | None] = {}
    for node in graph.model.graph:
        if node is look_up:
            continue
        inputs = [value for value in node.inputs if value is not None]
        read = [at for value in inputs if (at := layer(graph, value)) is not None]
        came = [0 if value.producer() is look_up else places[value.producer()] for value in inputs if value.producer() is not None]
        before = [at for at in came if at is not None]
        if read and (len(set(read)) > 1 or max(before, default=0) > read[0]):
            raise FusionError(f"The traced node '{node.name}' reads layers {sorted({*read, *before})}; blocks cannot be cut here.")
        places[node] = max((*read, *before), default=None)
    return places


def layer(graph: Graph, value: ir.Value) -> int | None:
    """The block of a weight or cache, by its name; the head's for weights outside the layers, None for constants and
    other values.
    """
    if match := LAYER.match(value.name) or PAST.match(value.name):
        return int(match[1])
    return graph.layers if graph.sources.get(value.name, Source()).tensors else None


def build(
    graph: Graph,
    name: str,
    nodes: list[ir.Node],
    states_in: list[ir.Value],
    states_out: list[ir.Value],
    observed: dict[str, ir.Value],
    multiplied: Sequence[ir.Node] = (),
    caches: Sequence[ir.Value] = (),
) -> Block:
    """The block that computes `states_out` and the observed values from `states_in`, and passes on those in both. Its
    names are the same for every layer. The products `multiplied` are left out: their results are inputs. `caches` are
    results too.
    """
    results = unique((*states_out, *observed.values(), *caches))
    copied: dict[ir.Value, ir.Value] = {}
    inputs: list[ir.Value] = []
    weights: dict[str, str] = {}
    initializers: list[ir.Value] = []
    for number, state in enumerate(states_in):
        copied[state] = stand_in(f"state.{number}", state)
        inputs.append(copied[state])
    products: dict[str, str] = {}
    for number, product in enumerate(multiplied):
        copied[product.outputs[0]] = copy = stand_in(f"product.{number}", product.outputs[0])
        inputs.append(copy)
        products[copy.name] = product.inputs[1].name
    given = set(copied)
    copies = []
    for node in needed(nodes, results, given):
        for value in node.inputs:
            if value is None or value in copied:
                continue
            copied[value] = copy = stand_in(LAYER.sub("", PAST.sub("past.", value.name)), value)
            source = graph.sources.get(value.name)
            if source is not None and source.constant is not None and source.constant.size <= INLINE:
                copy.const_value = ir.tensor(np.asarray(source.constant, np.float32), name=copy.name)
            elif source is not None:
                weights[copy.name] = value.name
            else:
                copy.const_value = value.const_value
            (inputs if copy.const_value is None else initializers).append(copy)
        outputs = []
        for value in node.outputs:
            outputs.append(ir.Value(name=f"value.{len(copied)}" if value.name else "", type=value.type))
            copied[value] = outputs[-1]
        taken = [None if value is None else copied[value] for value in node.inputs]
        copies.append(ir.Node(node.domain, node.op_type, taken, node.attributes.values(), outputs=outputs))
    for value in results:
        copied[value].type = ir.TensorType(ir.DataType.FLOAT)
    opsets = graph.model.graph.opset_imports
    outputs = [copied[value] for value in results if value not in given]
    cut = ir.Graph(inputs, outputs, nodes=copies, initializers=initializers, opset_imports=dict(opsets), name="block")
    model = ir.serde.serialize_model(ir.Model(cut, ir_version=graph.model.ir_version))
    return Block(
        name,
        model.SerializeToString(deterministic=True),
        tuple(copied[value].name for value in states_in),
        tuple(copied[value].name for value in states_out),
        {matrix: copied[value].name for matrix, value in observed.items()},
        {matrix: width for matrix, width in matrices(graph).items() if matrix in observed},
        weights,
        products,
        {str(cache.name): copied[cache].name for cache in caches},
        math.prod(graph.cache),
    )


def stand_in(name: str, value: ir.Value) -> ir.Value:
    """A value like another, with sizes only where they are fixed."""
    shape = value.shape and ir.Shape([size if isinstance(size, int) else None for size in value.shape])
    return ir.Value(name=name, type=value.type, shape=shape)


def needed(nodes: list[ir.Node], results: list[ir.Value], given: set[ir.Value]) -> list[ir.Node]:
    """Those of the nodes (in order) that the results depend on."""
    open_values, used = set(results), []
    for node in reversed(nodes):
        if open_values.intersection(node.outputs):
            used.append(node)
            open_values |= {value for value in node.inputs if value is not None and value not in given}
    return used[::-1]


def unique(values: Iterable[ir.Value]) -> list[ir.Value]:
    """The values in order, each once."""
    return list(dict.fromkeys(values))
