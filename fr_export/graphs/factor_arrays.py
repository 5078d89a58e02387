"""What a pair graph's inputs for an expert hold, made from the terms of its delta as `pair_segments` packs matrices."""

from collections.abc import Iterator, Sequence
from math import prod

import numpy as np

from fusionroute.fr_export.checkpoints.deltas import Delta, Term
from fusionroute.fr_export.checkpoints.tensors import StoredTensor
from fusionroute.fr_export.checkpoints.weights import Weights, finite
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.passes.pair_segments import DELTA, Factors
from fusionroute.runtime.adapters.factor_layout import Factor, FactorLayout, Group, Matrix, Plan, Vector


def layout_of(graph: Graph, factors: Sequence[Factors], vectors: Sequence[str], weights: Weights) -> FactorLayout:
    """How factors lie in the inputs that `pair_segments` has given to a graph, which has no weights yet.

    weights: of a checkpoint of its architecture, for the sizes of its tensors.
    """
    sources = graph.sources
    sizes = {name: tuple(map(int, value.shape)) for name, value in graph.model.graph.initializers.items() if name in sources}
    inputs = {b: name for each in factors for name, b in each.b.items()}

    def matrix(name: str, b: str) -> Matrix:
        return Matrix(b=b, tensors=[(tensor, weights.shape(tensor)[0]) for tensor in sources[name].tensors])

    groups = [
        Group(a=each.a, width=sizes[next(iter(each.b))][1], matrices=[matrix(name, b) for name, b in each.b.items()]) for each in factors
    ]
    own = [
        Vector(input=f"{DELTA}{name}", tensor=tensor, size=sizes[name][0], offset=sources[name].offset)
        for name in vectors
        for tensor in sources[name].tensors
    ]
    columns = {b: scale for b, name in inputs.items() if (scale := sources[name].column_scale) is not None}
    rows = {b: scale for b, name in inputs.items() if (scale := sources[name].row_scale) is not None}
    rows |= {f"{DELTA}{name}": scale for name in vectors if (scale := sources[name].row_scale) is not None}
    return FactorLayout(Plan(groups=groups, vectors=own), columns, rows)


class FactorArrays:
    """The inputs of one expert: their `shapes` by name, and in this order `arrays`; see `FactorLayout`."""

    def __init__(self, layout: FactorLayout, delta: Delta, expert: Weights):
        self._layout, self._expert = layout, expert
        self._factors = {tensor: [factor_of(term, tensor) for term in terms] for tensor, terms in delta.terms.items()}
        self.shapes = layout.shapes(self._factors)

    @property
    def bytes(self) -> int:
        """Of all arrays."""
        return 4 * sum(map(prod, self.shapes.values()))

    def arrays(self) -> Iterator[np.ndarray]:
        """float32. Raises InputError where a value is not finite."""
        return self._layout.arrays(self._factors, self._expert.read)


def factor_of(term: Term, tensor: str) -> Factor:
    """A term of a tensor's delta, its scale in b."""

    def read() -> tuple[np.ndarray, np.ndarray]:
        return whole(term.a, tensor), whole(term.b, tensor) * np.float32(term.scale)

    return Factor(term.a.shape[0], read)


def whole(factor: StoredTensor, matrix: str) -> np.ndarray:
    """A factor of a matrix, fp32. Raises InputError where a value is not finite."""
    with factor.open() as read:
        return finite(read(0, factor.shape[0]), matrix, factor)
