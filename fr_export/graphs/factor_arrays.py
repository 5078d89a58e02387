"""What a pair graph's inputs for an expert hold, made from the terms of its delta, or from factors that approximate it, as
`pair_segments` packs matrices.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_ir as ir

from fusionroute.fr_export.checkpoints.deltas import Delta, Term
from fusionroute.fr_export.checkpoints.tensors import StoredTensor
from fusionroute.fr_export.checkpoints.weights import Weights, finite
from fusionroute.fr_export.graphs.factors import LOOKUP, Factors
from fusionroute.fr_export.graphs.graph import Graph, Source
from fusionroute.runtime.adapters.factor_layout import Factor, FactorLayout, Group, Matrix, Plan, Vector, fill
from fusionroute.runtime.errors import InputError
from fusionroute.runtime.limits import DELTA
from fusionroute.runtime.tensor_file import WIDTHS, narrowed, widened

STORED = {ir.DataType.FLOAT: "F32", ir.DataType.FLOAT16: "F16", ir.DataType.BFLOAT16: "BF16"}  # as safetensors calls them


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
    ranks = {str(value.name): value.shape[0] for value in graph.model.graph.inputs if value.name in inputs}

    def shape(name: str) -> tuple[int, ...]:
        """[N, K] of x·a·b: of a look-up, x is one-hot."""
        return sizes[name.removesuffix(LOOKUP)][:: -1 if name.endswith(LOOKUP) else 1]

    def matrix(name: str, b: str) -> Matrix:
        size = shape(name)[0]
        tensors = () if name.endswith(LOOKUP) else sources[name].tensors
        return Matrix(b=b, size=size, tensors=[(tensor, min(size, weights.shape(tensor)[0])) for tensor in tensors])

    def group(each: Factors) -> Group:
        rank = ranks[next(iter(each.b.values()))]
        return Group(
            a=each.a,
            width=shape(next(iter(each.b)))[1],
            rank=rank if isinstance(rank, int) else None,
            matrices=[matrix(name, b) for name, b in each.b.items()],
        )

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
    plan = Plan(groups=list(map(group, factors)), vectors=own)
    types = {
        str(value.name): STORED[value.dtype]
        for value in graph.model.graph.inputs
        if str(value.name).startswith(DELTA) and value.dtype not in (None, ir.DataType.FLOAT)
    }
    return FactorLayout(plan, columns, rows, types)


def matrix_rank(source: Source, delta: Delta) -> int:
    """Of what a delta adds to a matrix, whose tensors have blocks of their own."""
    return sum(map(delta.rank, source.tensors))


class FactorArrays:
    """The inputs of one expert: their `shapes` by name, and in this order `arrays`; see `FactorLayout`."""

    def __init__(
        self,
        layout: FactorLayout,
        delta: Delta,
        expert: Weights,
        approximated: Mapping[str, LowRank] = {},
    ):
        """What is `approximated`, by its input b, does not come from the delta's terms."""
        self._layout, self._expert = layout, expert
        self._factors = {tensor: [factor_of(term, tensor) for term in terms] for tensor, terms in delta.terms.items()}
        self._whole = {b: (each.a, each.b) for b, each in approximated.items()}
        self.shapes = layout.shapes(self._factors, self._whole)

    @property
    def bytes_read(self) -> int:
        """Of all arrays, but for an embedding's factors of other tokens."""
        tables = {group.a for group in self._layout.plan.groups if not any(matrix.tensors for matrix in group.matrices)}
        return sum(WIDTHS[dtype] * (shape[-1] if name in tables else prod(shape)) for name, (dtype, shape) in self.entries.items())

    @property
    def entries(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name → type as safetensors names it, and shape."""
        return {name: (self._layout.types.get(name, "F32"), shape) for name, shape in self.shapes.items()}

    def arrays(self) -> Iterator[np.ndarray]:
        """Each in its type, of BF16 the bits. Raises InputError where a value is not finite in it."""
        wide = self._layout.arrays(self._factors, self._expert.read, self._whole)
        for (name, (dtype, _)), values in zip(self.entries.items(), wide, strict=True):
            array = narrowed(values, dtype)
            if not np.isfinite(widened(array, dtype)).all():
                raise InputError(f"The expert's '{name}' has values beyond the range of {dtype.lower()}: export another precision.")
            yield array


def factor_of(term: Term, tensor: str) -> Factor:
    """A term of a tensor's delta, its scale in b."""

    def read() -> tuple[np.ndarray, np.ndarray]:
        return whole(term.a, tensor), whole(term.b, tensor) * np.float32(term.scale)

    return Factor(term.a.shape[0], read)


def low_rank(source: Source, delta: Delta, weights: Weights) -> LowRank | None:
    """The factors of a matrix with such a source, which has no scales: those of its tensors in blocks. None: it has none.

    weights: of a checkpoint of its architecture, for the sizes of the tensors.
    """
    rank = matrix_rank(source, delta)
    if not rank:
        return None
    tensors = [(tensor, weights.shape(tensor)[0]) for tensor in source.tensors]
    matrix = Matrix(b="b", size=sum(rows for _, rows in tensors), tensors=tensors)
    a = np.zeros((weights.shape(tensors[0][0])[1], rank), np.float32)
    b = np.zeros((rank, matrix.size), np.float32)
    fill(matrix, {tensor: [factor_of(term, tensor) for term in delta.terms.get(tensor, ())] for tensor, _ in tensors}, a, b)
    return LowRank(a, b)


def whole(factor: StoredTensor, matrix: str) -> np.ndarray:
    """A factor of a matrix, fp32. Raises InputError where a value is not finite."""
    with factor.open() as read:
        return finite(read(0, factor.shape[0]), matrix, factor)
