"""Matrices whose checkpoint holds them in blocks already: a precision with blocks of its own takes those over as they
are, without a second rounding.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from fusionroute.fr_export.checkpoints.stored_blocks import BlockLayout, BlockStored
from fusionroute.fr_export.checkpoints.weights import Weights
from fusionroute.fr_export.graphs.graph import Graph, Source, users
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision.blockwise import PIECE, Format, Quantised, Stored, attach, nearest_grid, store_blocks
from fusionroute.fr_export.precision.scheme import Scheme


class Carrying(Scheme, Protocol):
    """A precision that takes over blocks of `carried_bits` per value."""

    carried_bits: int


class Carried:
    """A scheme for one model, but for the matrices that were taken over: `stored` has these by name."""

    def __init__(self, rest: Scheme, stored: Mapping[str, Stored], others: int):
        """`others` counts the values of the matrices that are left to `rest`."""
        values = sum(each.values.length * 8 // each.format.bits for each in stored.values())
        self.name = rest.name
        self.bits = (sum(each.bytes for each in stored.values()) * 8 + rest.bits * others) / (values + others)
        self._rest, self._stored = rest, stored

    @property
    def about(self) -> dict[str, Any]:
        """For the report: how many matrices were taken over, and what the rest of the scheme says."""
        return {"carried": len(self._stored), **getattr(self._rest, "about", {})}

    def bind(self, graph: Graph, matrix: ir.Value, rows: Iterator[np.ndarray], store: Store) -> None:
        """Replace the operators that read the matrix."""
        if matrix.name in self._stored:
            attach(graph, matrix, self._stored[matrix.name])
        else:
            self._rest.bind(graph, matrix, rows, store)
