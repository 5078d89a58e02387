"""What a pair graph's inputs for an expert hold, made from the terms of its delta as `pair_segments` packs matrices."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from fusionroute.fr_export.checkpoints.deltas import Delta
from fusionroute.fr_export.checkpoints.tensors import StoredTensor
from fusionroute.fr_export.checkpoints.weights import Weights, finite
from fusionroute.fr_export.graphs.graph import Graph, Source
from fusionroute.fr_export.graphs.passes.pair_segments import Factors
from fusionroute.fr_export.graphs.source_rows import rows
from fusionroute.runtime.errors import InputError
from fusionroute.runtime.limits import DELTA


class FactorArrays:
    """The inputs of one expert: their `shapes` and `types` by name, and in this order `arrays`.

    A matrix that is stacked from several tensors has their factors in blocks. The matrices that read one value have one
    rank: the graph's, or else the largest of theirs and at least 1, since ONNX Runtime 1.23 splits nothing empty; what
    they do not need of it is zero.
    """

    def __init__(self, graph: Graph, factors: Sequence[Factors], vectors: Sequence[str], delta: Delta, expert: Weights):
        """`graph` has no weights yet. `factors` and `vectors` are those of `pair_segments`."""
        self._sources, self._factors, self._vectors, self._delta, self._expert = graph.sources, factors, vectors, delta, expert
        inputs = {str(value.name): value for value in graph.model.graph.inputs}
        sizes = {name: tuple(map(int, value.shape)) for name, value in graph.model.graph.initializers.items() if name in graph.sources}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for each in factors:
            rank = inputs[next(iter(each.b.values()))].shape[0]
            if not isinstance(rank, int):
                rank = max(1, *(matrix_rank(graph.sources[name], delta) for name in each.b))
            width = sizes[next(iter(each.b))][1]
            self.shapes[each.a] = width, len(each.b) * rank
            self.shapes |= {b: (rank, sizes[name][0]) for name, b in each.b.items()}
        self.shapes |= {f"{DELTA}{name}": sizes[name] for name in vectors}
        self.types = {name: inputs[name].dtype or ir.DataType.FLOAT for name in self.shapes}

    @property
    def bytes(self) -> int:
        """Of all arrays."""
        return sum(int(self.types[name].itemsize) * math.prod(shape) for name, shape in self.shapes.items())

    def arrays(self) -> Iterator[np.ndarray]:
        """Each in its type. Raises InputError where a value is not finite in it."""
        for (name, dtype), array in zip(self.types.items(), self._wide_arrays(), strict=True):
            with np.errstate(over="ignore"):
                narrow = array.astype(dtype.numpy(), copy=False)
            if not np.isfinite(narrow).all():
                raise InputError(f"The expert's '{name}' has values beyond the range of {dtype.name.lower()}: export another precision.")
            yield narrow

    def _wide_arrays(self) -> Iterator[np.ndarray]:
        """All of them in float32. Raises InputError where a value is not finite."""
        for each in self._factors:
            a = np.zeros(self.shapes[each.a], np.float32)
            every_b = [np.zeros(self.shapes[b], np.float32) for b in each.b.values()]
            for name, part, b in zip(each.b, np.split(a, len(every_b), axis=1), every_b, strict=True):
                self._fill(self._sources[name], part, b)
            yield a
            yield from every_b
        for name in self._vectors:
            yield np.concatenate(list(rows(self._sources[name], self._expert)))

    def _fill(self, source: Source, a: np.ndarray, b: np.ndarray) -> None:
        """Write the factors of one matrix into a [K, r] and b [r, N], with the scales of its rows and columns."""
        row = column = 0
        for tensor in source.tensors:
            next_row = row + self._expert.shape(tensor)[0]
            for term in self._delta.terms.get(tensor, ()):
                block = slice(column, column + term.a.shape[0])
                a[:, block] = whole(term.a, tensor).T
                b[block, row:next_row] = whole(term.b, tensor).T * np.float32(term.scale)
                column = block.stop
            row = next_row
        if source.column_scale is not None:
            a *= source.column_scale[:, None]
        if source.row_scale is not None:
            b *= source.row_scale


def matrix_rank(source: Source, delta: Delta) -> int:
    """Of what a delta adds to a matrix, whose tensors have blocks of their own."""
    return sum(map(delta.rank, source.tensors))


def whole(factor: StoredTensor, matrix: str) -> np.ndarray:
    """A factor of a matrix, fp32. Raises InputError where a value is not finite."""
    with factor.open() as read:
        return finite(read(0, factor.shape[0]), matrix, factor)
