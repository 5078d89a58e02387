"""What a precision scheme does: put one weight matrix into the store and make the operators that use it read it there."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import onnx_ir as ir

from fr_export.graph import Graph
from fr_export.store import Store


class Scheme(Protocol):
    """One precision for the `ort` dialect. `bits` is what a weight of a matrix costs on disk, scales included."""

    name: str
    bits: float

    def bind(self, graph: Graph, matrix: ir.Value, rows: Iterator[np.ndarray], store: Store) -> None:
        """Store `matrix` [out, in], which arrives as fp32 slices of its rows, and rewrite its users (FusedMatMul, Gather)."""
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
