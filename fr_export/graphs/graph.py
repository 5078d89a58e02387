"""A traced graph without weights: an ONNX IR model, and the checkpoint tensors that each initialiser is made of."""

from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

INLINE = 64  # constants of up to so many values stand in the graph itself


@dataclass(frozen=True)
class Source:
    """Where an initialiser's values come from: checkpoint tensors stacked along their rows, or a constant of the
    config.

    `offset` is added to every value (the 1 of Gemma's 1 + w). `rows` cuts a padded vocabulary. Then every row (of a
    vector: every value) is multiplied by its value of `row_scale`, every column of a matrix by its value of
    `column_scale`.
    """

    tensors: tuple[str, ...] = ()
    offset: float = 0.0
    rows: int | None = None
    constant: np.ndarray | None = field(default=None, compare=False)
    row_scale: np.ndarray | None = field(default=None, compare=False)
    column_scale: np.ndarray | None = field(default=None, compare=False)


@dataclass
class Graph:
    """One architecture in one dialect. Initialisers in `model` have types and shapes but no values; `sources` says what
    they are.

    `cache` is the shape [kv_heads, head_size] of one position in each layer's key and value buffers.
    """

    model: ir.Model
    sources: dict[str, Source]
    layers: int
    cache: tuple[int, int]

    @property
    def parameters(self) -> int:
        """Number of checkpoint values that the graph reads. A tied embedding counts once."""
        values = self.model.graph.initializers
        return sum(int(np.prod(values[name].shape)) for name, source in self.sources.items() if source.tensors)

    def clone(self) -> "Graph":
        """A copy whose nodes and initialisers can be rewritten for one model and one precision."""
        return Graph(self.model.clone(), dict(self.sources), self.layers, self.cache)

    def with_sources_of(self, other: "Graph") -> "Graph":
        """This graph with the sources of one in another dialect, whose initialisers have the same names."""
        return replace(self, sources={name: other.sources.get(name, source) for name, source in self.sources.items()})


def node(
    graph: ir.Graph,
    before: ir.Node | None,
    op: str,
    inputs: list[ir.Value | None],
    outputs: list[ir.Value],
    **attributes: int | float | str | list[int],
) -> ir.Node:
    """Insert a node `domain::op` in front of `before` (or at the end) with existing or new output values."""
    domain, _, op_type = op.rpartition("::")
    new = ir.Node(domain, op_type, inputs, ir.convenience.convert_attributes(attributes), outputs=outputs)
    if before is None:
        graph.append(new)
    else:
        graph.insert_before(before, new)
    return new


def added(
    inner: ir.Graph, before: ir.Node, op: str, inputs: list[ir.Value | None], name: str, shape: ir.Shape | tuple[int, ...] | None = None,
    dtype: ir.DataType = ir.DataType.FLOAT, **attributes: int | list[int],
) -> ir.Value:  # fmt: skip
    """The result of a new node."""
    result = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape) if isinstance(shape, tuple) else shape)
    node(inner, before, op, inputs, [result], **attributes)
    return result


def initializer(
    graph: ir.Graph, name: str, dtype: ir.DataType, shape: tuple[int, ...], tensor: ir.TensorProtocol | None = None
) -> ir.Value:
    """Register a new initialiser, with its values or (None) to be filled when weights are bound."""
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=tensor)
    graph.initializers[name] = value
    return value


def users(matrix: ir.Value) -> tuple[list[ir.Node], list[ir.Node]]:
    """The products and the embedding look-ups that read a matrix. A tied embedding has both."""
    products = [n for n in matrix.consumers() if n.op_type == "FusedMatMul"]
    lookups = [n for n in matrix.consumers() if n.op_type == "Gather"]
    return products, lookups


def replace_node(inner: ir.Graph, old: ir.Node, fresh: ir.Value) -> None:
    """Let `fresh` stand where the old node's result stood, and remove the node."""
    result = old.outputs[0]
    name = result.name
    result.replace_all_uses_with(fresh, replace_graph_outputs=True)
    inner.remove(old, safe=True)
    fresh.name = name
