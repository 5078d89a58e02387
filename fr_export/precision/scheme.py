"""What a precision scheme does: store a weight matrix, and make the operators that use it read it there."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import onnx_ir as ir

from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision.blockwise import Format
from fusionroute.fr_export.precision.fit_context import FitContext


class Scheme(Protocol):
    """One precision for the `ort` dialect. `bits` is what a weight of a matrix costs on disk, scales included."""

    name: str
    bits: float

    def bind(self, graph: Graph, matrix: ir.Value, rows: Iterator[np.ndarray], store: Store) -> None:
        """Store `matrix` [out, in], which arrives as fp32 slices of its rows, and rewrite its users (FusedMatMul,
        Gather).
        """
        ...


class Fitted(Scheme, Protocol):
    """A scheme made for one model. `about` is what the report says of it."""

    @property
    def about(self) -> dict[str, Any]:
        """As plain data."""
        ...


@runtime_checkable
class Carrying(Scheme, Protocol):
    """A precision that takes over blocks of as many bits as the format `carries` has, where a checkpoint holds them."""

    carries: Format


@runtime_checkable
class Fitting(Scheme, Protocol):
    """A precision that is better (or only possible) where the model's activations are known. Its own `bind` rounds
    without them. One that may spend more than `bits` on what is sensitive says how much on average, as `most_bits`.
    """

    def fit(self, context: FitContext) -> tuple[Graph, Fitted]:
        """The graph to bind (with other sources, or as it is) and the scheme to bind it with, for one model.

        Raises InputError as `Weights` and `BlockwiseForward` do.
        """
        ...


Schemes = Mapping[str, tuple[Scheme, ...]]  # target → the schemes that a module has for it
