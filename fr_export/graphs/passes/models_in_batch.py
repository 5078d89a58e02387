"""One graph for models of one base, which read shares of a batch: every product reads the base's weights once for all.

The models follow one another along the batch, the base first, each with as many texts as the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from fusionroute.fr_export.graphs.factor_arrays import LowRank
from fusionroute.fr_export.graphs.graph import Graph, Source, initializer
from fusionroute.fr_export.graphs.passes.pair_segments import NORMS
from fusionroute.fr_export.graphs.weight_store import Store

FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True)
class Change:
    """What a model has other than the base, by the names of matrices and vectors in the graph; None: nothing."""

    factors: Callable[[str], LowRank | None]
    vector: Callable[[str], np.ndarray | None]


def models_in_batch(graph: Graph, changes: Sequence[Change], store: Store) -> None:
    """Rewrite a graph of the `ort` dialect before it has weights, for the base and a model for each of the `changes`, whose
    values go to the store. What is neither a product nor a norm or bias stays the base's.
    """
    sharing = _Sharing(graph, changes, store)
    for node in list(graph.model.graph):
        if node.op_type in NORMS:
            sharing.apply_vectors(node, NORMS[node.op_type], "Mul", 1.0)
        elif node.op_type == "Add" and node.inputs[1] is not None and node.inputs[1].name in graph.sources:
            sharing.apply_vectors(node, 1, "Add", 0.0)
        elif node.op_type == "FusedMatMul":
            sharing.add_factors(node)


class _Sharing:
    """One rewrite. `parts`: the models' shares of each value that was split."""

    def __init__(self, graph: Graph, changes: Sequence[Change], store: Store):
        self.graph, self.inner, self.changes, self.store = graph, graph.model.graph, changes, store
        self.parts: dict[ir.Value, list[ir.Value]] = {}

    def apply_vectors(self, node: ir.Node, place: int, op: str, neutral: float) -> None:
        """Let a node that scales or shifts by a vector do so by each model's own."""
        vector, result = node.inputs[place], node.outputs[0]
        assert vector is not None
        values = [change.vector(str(vector.name)) for change in self.changes]
        if all(own is None for own in values):
            return
        own_vectors = [
            vector,
            *(vector if own is None else self.stored(f"{number}.{vector.name}", own) for number, own in enumerate(values)),
        ]
        node.replace_input_with(place, self.constant(vector, neutral))
        shares = [ir.Value(name=f"{result.name}.own.{number}", type=result.type) for number in range(len(own_vectors))]
        joined = self.join(node, shares)
        split = self.split(result)
        nodes = [ir.Node("", op, [x, own], outputs=[y]) for x, own, y in zip(split, own_vectors, shares, strict=True)]
        self.inner.insert_before(joined, nodes)

    def add_factors(self, product: ir.Node) -> None:
        """Add each model's factors to its share of a product."""
        x, matrix, result = product.inputs[0], product.inputs[1], product.outputs[0]
        assert x is not None and matrix is not None
        factors = [change.factors(str(matrix.name)) for change in self.changes]
        if all(own is None for own in factors):
            return
        rows = self.split(x)
        shares: list[ir.Value] = [ir.Value(name=f"{result.name}.of.{number}", type=result.type) for number in range(len(rows))]
        joined = self.join(product, shares)
        nodes = []
        for number, (part, total) in enumerate(zip(self.split(result), shares, strict=True)):
            own = factors[number - 1] if number else None
            if own is None:
                nodes.append(ir.Node("", "Identity", [part], outputs=[total]))
                continue
            a, b = (self.stored(f"{number}.{matrix.name}.{kind}", values) for kind, values in (("a", own.a), ("b", own.b)))
            narrow, delta = (ir.Value(name=f"{total.name}.{kind}", type=result.type) for kind in ("narrow", "delta"))
            nodes.append(ir.Node("", "MatMul", [rows[number], a], outputs=[narrow]))
            nodes.append(ir.Node("", "MatMul", [narrow, b], outputs=[delta]))
            nodes.append(ir.Node("", "Add", [part, delta], outputs=[total]))
        self.inner.insert_before(joined, nodes)

    def join(self, node: ir.Node, shares: Sequence[ir.Value]) -> ir.Node:
        """Let the models' shares stand for a node's result, joined behind it."""
        result = node.outputs[0]
        joined = ir.Value(name=f"{result.name}.joined.{len(self.parts)}", type=result.type, shape=result.shape)
        result.replace_all_uses_with(joined)
        concat = ir.Node("", "Concat", list(shares), [ir.AttrInt64("axis", 0)], outputs=[joined])
        self.inner.insert_after(node, concat)
        return concat

    def split(self, value: ir.Value) -> list[ir.Value]:
        """The models' shares of a value."""
        if value not in self.parts:
            count = len(self.changes) + 1
            own = [ir.Value(name=f"{value.name}.part.{number}", type=value.type) for number in range(count)]
            splitter = ir.Node("", "Split", [value], [ir.AttrInt64("axis", 0), ir.AttrInt64("num_outputs", count)], outputs=own)
            maker = value.producer()
            assert maker is not None
            self.inner.insert_after(maker, splitter)
            self.parts[value] = own
        return self.parts[value]

    def constant(self, vector: ir.Value, value: float) -> ir.Value:
        """A vector that scales or shifts nothing, as long as another one."""
        width = int(vector.shape[0])
        name = f"{value}.{width}"
        self.graph.sources[name] = Source(constant=np.full(width, value, np.float32))
        return self.inner.initializers.get(name) or initializer(self.inner, name, FLOAT, (width,))

    def stored(self, name: str, array: np.ndarray) -> ir.Value:
        """An initialiser with values of a model's own."""
        values = np.ascontiguousarray(array, np.float32)
        return initializer(self.inner, name, FLOAT, values.shape, self.store.put(values, name).tensor(name, FLOAT, values.shape))
