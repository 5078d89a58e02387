"""What a pair graph's inputs for an expert hold, made from the terms of its delta, or from factors that approximate it, as
`pair_segments` packs matrices.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from fusionroute.fr_export.checkpoints.deltas import Delta, Term
from fusionroute.fr_export.checkpoints.tensors import StoredTensor
from fusionroute.fr_export.checkpoints.weights import Weights, finite
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.passes.pair_segments import DELTA, LOOKUP, Factors
from fusionroute.runtime.adapters.factor_layout import Factor, FactorLayout, Group, Matrix, Plan, Vector


@dataclass(frozen=True)
class LowRank:
    """What a matrix [N, K] gains: (a·b)ᵀ, a float32 [K, r] and b float32 [r, N], without the scales of its source."""

    a: np.ndarray
    b: np.ndarray


def layout_of(graph: Graph, factors: Sequence[Factors], vectors: Sequence[str], weights: Weights) -> FactorLayout:
    """How factors lie in the inputs that `pair_segments` has given to a graph, which has no weights yet.

    weights: of a checkpoint of its architecture, for the sizes of its tensors.
    """
    sources = graph.sources
    sizes = {name: tuple(map(int, value.shape)) for name, value in graph.model.graph.initializers.items() if name in sources}
    inputs = {b: name for each in factors for name, b in each.b.items()}

    def shape(name: str) -> tuple[int, ...]:
        """[N, K] of x·a·b: of a look-up, x is one-hot."""
        return sizes[name.removesuffix(LOOKUP)][:: -1 if name.endswith(LOOKUP) else 1]

    def matrix(name: str, b: str) -> Matrix:
        size = shape(name)[0]
        tensors = () if name.endswith(LOOKUP) else sources[name].tensors
        return Matrix(b=b, size=size, tensors=[(tensor, min(size, weights.shape(tensor)[0])) for tensor in tensors])

    groups = [
        Group(a=each.a, width=shape(next(iter(each.b)))[1], matrices=[matrix(name, b) for name, b in each.b.items()]) for each in factors
    ]
    own = [
        Vector(
            input=f"{DELTA}{name}",
            tensors=[(tensor, weights.shape(tensor)[0]) for tensor in sources[name].tensors],
            offset=sources[name].offset,
        )
        for name in vectors
    ]
    scaled = {b: sources[name] for b, name in inputs.items() if name in sources}  # an embedding is never scaled
    columns = {b: source.column_scale for b, source in scaled.items() if source.column_scale is not None}
    rows = {b: source.row_scale for b, source in scaled.items() if source.row_scale is not None}
    rows |= {f"{DELTA}{name}": scale for name in vectors if (scale := sources[name].row_scale) is not None}
    return FactorLayout(Plan(groups=groups, vectors=own), columns, rows)


class FactorArrays:
    """The inputs of one expert: their `shapes` by name, and in this order `arrays`; see `FactorLayout`."""

    def __init__(self, layout: FactorLayout, delta: Delta, expert: Weights, approximated: Mapping[str, LowRank] = {}):
        """What is `approximated`, by its input b, does not come from the delta's terms."""
        self._layout, self._expert = layout, expert
        self._factors = {tensor: [factor_of(term, tensor) for term in terms] for tensor, terms in delta.terms.items()}
        self._whole = {b: (each.a, each.b) for b, each in approximated.items()}
        self.shapes = layout.shapes(self._factors, self._whole)

    @property
    def bytes_read(self) -> int:
        """Of all arrays, but for an embedding's factors of other tokens."""
        tables = {group.a for group in self._layout.plan.groups if not any(matrix.tensors for matrix in group.matrices)}
        return 4 * sum(shape[-1] if name in tables else prod(shape) for name, shape in self.shapes.items())

    def arrays(self) -> Iterator[np.ndarray]:
        """float32. Raises InputError where a value is not finite."""
        return self._layout.arrays(self._factors, self._expert.read, self._whole)


def factor_of(term: Term, tensor: str) -> Factor:
    """A term of a tensor's delta, its scale in b."""

    def read() -> tuple[np.ndarray, np.ndarray]:
        return whole(term.a, tensor), whole(term.b, tensor) * np.float32(term.scale)

    return Factor(term.a.shape[0], read)


def whole(factor: StoredTensor, matrix: str) -> np.ndarray:
    """A factor of a matrix, fp32. Raises InputError where a value is not finite."""
    with factor.open() as read:
        return finite(read(0, factor.shape[0]), matrix, factor)
