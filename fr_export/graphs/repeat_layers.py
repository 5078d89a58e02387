"""Put the layers that a trace left out into its graph, as copies of traced ones that they equal."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import onnx_ir as ir

from fusionroute.fr_export.graphs.decoder_blocks import embedding, layer, place, unique
from fusionroute.fr_export.graphs.graph import Graph, Source
from fusionroute.fr_export.graphs.layer_kinds import Alike
from fusionroute.runtime.errors import FusionError

# the layer of a node, and of a value that no node makes; None where layers share it
Owners = Mapping[ir.Node | ir.Value, int | None]


@dataclass
class Layer:
    """The nodes of a traced layer (or of the head), in the graph's order, and the `states` of the layer before that they
    read, in the order in which they do.
    """

    number: int
    nodes: list[ir.Node]
    states: list[ir.Value]


def repeat_layers(graph: Graph, kinds: Sequence[Alike], outputs: Sequence[str]) -> None:
    """Make a trace without the layers that `kinds` leave out what it is with them. `outputs`: the graph's, by name.

    Raises FusionError where the traced layers do not show that copies of them are right.
    """
    templates = {number: each.template for each in kinds for number in each.left_out}
    owners = owned(graph)
    layers = traced_layers(graph, owners, [number for number in range(graph.layers + 1) if number not in templates])
    check(graph, owners, layers, kinds)
    following = dict(zip(layers, list(layers.values())[1:], strict=False))
    orders = [with_copies(names, graph, owners, templates) for names in (graph.model.graph.initializers, graph.sources)]
    states: list[ir.Value] = []
    for number in range(graph.layers + 1):
        if number in templates:
            template = layers[templates[number]]
            nodes, copies = copied(graph, owners, template, number, states, outputs)
            latest = max(each for each in layers if each < number)
            graph.model.graph.insert_before(following[latest].nodes[0], nodes)
            states = [copies[state] for state in following[template.number].states]
            continue
        for node in layers[number].nodes:
            for at, value in enumerate(node.inputs):
                if value in layers[number].states:
                    node.replace_input_with(at, states[layers[number].states.index(value)])
        states = following[number].states if number in following else []
    for mapping, order in zip((graph.model.graph.initializers, graph.sources), orders, strict=True):
        values: dict[str, Any] = {name: mapping[name] for name in order}
        assert len(values) == len(mapping)
        mapping.clear()
        mapping.update(values)


def owned(graph: Graph) -> Owners:
    """Whose weights or caches each node or value needs, or who alone reads it. The head counts as a layer."""
    look_up = embedding(graph)
    owners: dict[ir.Node | ir.Value, int | None] = {look_up: 0, **place(graph, look_up)}

    def reader(values: Iterable[ir.Value]) -> int | None:
        """The layer that alone reads these values."""
        at = {owners[user] for value in values for user in value.consumers()}
        return at.pop() if len(at) == 1 else None

    for node in reversed(list(graph.model.graph)):
        if owners[node] is None:
            owners[node] = reader(node.outputs)
    for value in (*graph.model.graph.inputs, *graph.model.graph.initializers.values()):
        at = layer(graph, value)
        owners[value] = reader([value]) if at is None else at
    return owners


def traced_layers(graph: Graph, owners: Owners, numbers: Sequence[int]) -> dict[int, Layer]:
    """The traced layers and the head by number. Raises FusionError where one is no stretch of the graph, or reads what
    another than the one before it made.
    """
    nodes: dict[int, list[ir.Node]] = {number: [] for number in numbers}
    latest = 0
    for node in graph.model.graph:
        at = owners[node]
        if at is None:
            continue
        if at < latest or at not in nodes:
            raise unrepeatable(f"a node of layer {at} stands behind those of layer {latest}")
        nodes[at].append(node)
        latest = at
    layers = {}
    for before, number in zip([None, *numbers], numbers, strict=False):
        states = []
        for value in unique(value for node in nodes[number] for value in node.inputs if value is not None):
            maker = None if value.producer() is None else owners[value.producer()]
            if maker is not None and maker not in (before, number):
                raise unrepeatable(f"layer {number} reads a value of layer {maker}")
            if maker is not None and maker == before:
                states.append(value)
        layers[number] = Layer(number, nodes[number], states)
    return layers


def check(graph: Graph, owners: Owners, layers: Mapping[int, Layer], kinds: Sequence[Alike]) -> None:
    """Raise FusionError unless layers of one kind are equal, and all pass on the same states."""
    for each in kinds:
        if described(graph, owners, layers[each.template]) != described(graph, owners, layers[each.last]):
            raise unrepeatable(f"its layers {each.template} and {each.last} differ")
    ends = [[(state.producer().op_type, state.index()) for state in one.states] for one in list(layers.values())[2:]]
    if any(end != ends[0] for end in ends):
        raise unrepeatable("its layers pass on different states")


def described(graph: Graph, owners: Owners, one: Layer) -> list[Any]:
    """What a layer computes from the states before it: equal for layers that differ in their number alone."""
    values: dict[ir.Value | None, Any] = {None: None, **{state: number for number, state in enumerate(one.states)}}
    for value in unique(value for node in one.nodes for value in node.inputs if value is not None):
        if value.producer() is None or owners[value.producer()] is None:
            values[value] = described_value(graph, value, one.number) if owners.get(value) == one.number else id(value)
    lines = []
    for at, node in enumerate(one.nodes):
        attributes = sorted(ir.serde.serialize_attribute(attribute).SerializeToString() for attribute in node.attributes.values())
        inputs = [values[value] for value in node.inputs]
        results = [(bool(value.name), value.dtype, str(value.shape), value.is_graph_output()) for value in node.outputs]
        values |= {value: (at, index) for index, value in enumerate(node.outputs)}
        lines.append((node.domain, node.op_type, attributes, inputs, results))
    return lines


def described_value(graph: Graph, value: ir.Value, number: int) -> Any:
    """A layer's own weight, constant or cache. Constants have no name that tells their layer: only their values count."""
    source, constant = graph.sources.get(value.name, Source()), value.const_value
    array = source.constant if constant is None else constant.numpy()
    if array is not None:
        return str(array.dtype), array.shape, array.tobytes()
    return renamed(value.name, number, 0), value.dtype, str(value.shape), of_layer(source, number, 0)


def copied(
    graph: Graph, owners: Owners, template: Layer, number: int, states: Sequence[ir.Value], outputs: Sequence[str]
) -> tuple[list[ir.Node], dict[ir.Value, ir.Value]]:
    """The nodes of a layer left out, which reads `states` of the one before it, and value of its template → its own."""
    inner = graph.model.graph
    inputs = {value.name: value for value in inner.inputs}
    copies = dict(zip(template.states, states, strict=True))
    nodes = []
    for node in template.nodes:
        for value in node.inputs:
            if value is None or value in copies or owners.get(value) != template.number:
                continue
            name = renamed(value.name, template.number, number)
            copies[value] = inputs[name] if value.is_graph_input() else initializer(graph, value, template.number, number)
        results = []
        for value in node.outputs:
            name = value.name and renamed(value.name, template.number, number)
            copies[value] = ir.Value(name=name, type=value.type, shape=value.shape and value.shape.copy())
            results.append(copies[value])
            if value.is_graph_output():
                inner.outputs[outputs.index(name)] = copies[value]
        nodes.append(
            ir.Node(
                node.domain,
                node.op_type,
                [value and copies.get(value, value) for value in node.inputs],
                node.attributes.values(),
                outputs=results,
                name=node.name and renamed(node.name, template.number, number),
            )
        )
    return nodes, copies


def initializer(graph: Graph, value: ir.Value, template: int, number: int) -> ir.Value:
    """A layer's own weight or constant, registered with its source, from that of its template."""
    name = renamed(value.name, template, number)
    constant = value.const_value and ir.tensor(value.const_value.numpy(), name=name)
    copy = ir.Value(name=name, type=value.type, shape=value.shape, const_value=constant)
    graph.model.graph.initializers[name] = copy
    if value.name in graph.sources:
        graph.sources[name] = of_layer(graph.sources[value.name], template, number)
    return copy


def with_copies(names: Iterable[str], graph: Graph, owners: Owners, templates: Mapping[int, int]) -> list[str]:
    """The names of initialisers in the order that a trace of all layers gives them.

    Such a list goes through the layers several times (weights, constants, packed weights): a copy's stretch stands
    behind its template's, before those of later layers.
    """
    at = {name: owners[value] for name, value in graph.model.graph.initializers.items()}
    stretches = [(number, list(group)) for number, group in groupby(names, at.get)]
    for number, template in sorted(templates.items()):
        for stretch in [each for each in stretches if each[0] == template]:
            start = stretches.index(stretch)
            later = [place for place, (owner, _) in enumerate(stretches) if place > start and owner is not None and owner > number]
            copies = [renamed(name, template, number) for name in stretch[1]]
            stretches.insert(later[0] if later else len(stretches), (number, copies))
    return [name for _, stretch in stretches for name in stretch]


def of_layer(source: Source, number: int, other: int) -> Source:
    """A source of one layer's tensors as that of another's."""
    return replace(source, tensors=tuple(renamed(tensor, number, other) for tensor in source.tensors))


def renamed(name: str, number: int, other: int) -> str:
    """The name for another layer: of a weight or cache by its number, of other values and nodes with a suffix."""
    renumbered: str = name.replace(f".{number}.", f".{other}.", 1)
    return renumbered if renumbered != name else f"{name}.{other}"


def unrepeatable(reason: str) -> FusionError:
    """The error for a trace whose layers have to be traced one by one."""
    return FusionError(f"The traced layers cannot be repeated: {reason}.")
