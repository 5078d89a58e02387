"""What a precision scheme does: put one weight matrix into the store and make the operators that use it read it there."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
import onnx_ir as ir

from fusionroute.fr_export.checkpoints.weights import Weights
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision.evidence import Evidence


class Scheme(Protocol):
    """One precision for the `ort` dialect. `bits` is what a weight of a matrix costs on disk, scales included."""

    name: str
    bits: float

    def bind(self, graph: Graph, matrix: ir.Value, rows: Iterator[np.ndarray], store: Store) -> None:
        """Store `matrix` [out, in], which arrives as fp32 slices of its rows, and rewrite its users (FusedMatMul, Gather)."""
        ...


class Fitted(Scheme, Protocol):
    """A scheme made for one model. `about` is what the report says of it."""

    @property
    def about(self) -> dict[str, Any]:
        """As plain data."""
        ...


@runtime_checkable
class Fitting(Scheme, Protocol):
    """A precision that is better (or only possible) where the model's activations are known. Its own `bind` rounds without them."""

    def fit(
        self, graph: Graph, weights: Weights, known: Evidence, store: Store, shared: dict[str, Any], advance: Callable[[int], None]
    ) -> tuple[Graph, Fitted]:
        """The graph to bind (with other sources, or as it is) and the scheme to bind it with, for one model.

        `shared` is empty for the first model of a variant and then handed on: what models have in common is stored once.
        `advance(n)` is told of every n values done. Raises InputError as `Weights` and `Walk` do.
        """
        ...


def users(matrix: ir.Value) -> tuple[list[ir.Node], list[ir.Node]]:
    """The products and the embedding look-ups that read a matrix. A tied embedding has both."""
    products = [n for n in matrix.consumers() if n.op_type == "FusedMatMul"]
    lookups = [n for n in matrix.consumers() if n.op_type == "Gather"]
    return products, lookups


def replace(inner: ir.Graph, old: ir.Node, fresh: ir.Value) -> None:
    """Let `fresh` stand where the old node's result stood, and remove the node."""
    result = old.outputs[0]
    name = result.name
    result.replace_all_uses_with(fresh, replace_graph_outputs=True)
    inner.remove(old, safe=True)
    fresh.name = name
