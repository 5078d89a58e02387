"""What a pair graph's inputs for an expert hold, made from the terms of its delta, or from factors that approximate it, as
`pair_segments` packs matrices.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fusionroute.fr_export.checkpoints.deltas import Delta
from fusionroute.fr_export.checkpoints.tensors import StoredTensor
from fusionroute.fr_export.checkpoints.weights import Weights, finite
from fusionroute.fr_export.graphs.graph import Graph, Source
from fusionroute.fr_export.graphs.passes.pair_segments import DELTA, LOOKUP, Factors
from fusionroute.fr_export.graphs.source_rows import rows


@dataclass(frozen=True)
class LowRank:
    """What a matrix [N, K] gains: (a·b)ᵀ, a float32 [K, r] and b float32 [r, N], without the scales of its source."""

    a: np.ndarray
    b: np.ndarray


class FactorArrays:
    """The inputs of one expert: their `shapes` by name, and in this order `arrays`.

    A matrix that is stacked from several tensors has their factors in blocks. The matrices that read one value have one
    rank, the largest of theirs and at least 1, since ONNX Runtime 1.23 splits nothing empty; what they do not need of
    it is zero.
    """

    def __init__(
        self, graph: Graph, factors: Sequence[Factors], vectors: Sequence[str], delta: Delta, expert: Weights,
        approximated: Mapping[str, LowRank] = {},
    ):  # fmt: skip
        """`factors` and `vectors` are those of `pair_segments`. What is `approximated` (by the names in `Factors.b`) does
        not come from the delta's terms.
        """
        self._sources, self._factors, self._vectors, self._delta, self._expert = graph.sources, factors, vectors, delta, expert
        self._approximated = approximated
        self.shapes: dict[str, tuple[int, ...]] = {}
        for each in factors:
            rank = max(1, *map(self._rank, each.b))
            outputs, inputs = zip(*map(self._size, each.b), strict=True)
            self.shapes[each.a] = inputs[0], len(each.b) * rank
            self.shapes |= {b: (rank, size) for b, size in zip(each.b.values(), outputs, strict=True)}
        self.shapes |= {f"{DELTA}{name}": (sum(expert.shape(tensor)[0] for tensor in self._sources[name].tensors),) for name in vectors}

    @property
    def bytes_read(self) -> int:
        """Of all arrays, but for an embedding's factors of other tokens."""
        tables = {each.a for each in self._factors if all(name.endswith(LOOKUP) for name in each.b)}
        return 4 * sum(shape[-1] if name in tables else math.prod(shape) for name, shape in self.shapes.items())

    def arrays(self) -> Iterator[np.ndarray]:
        """float32. Raises InputError where a value is not finite."""
        for each in self._factors:
            a = np.zeros(self.shapes[each.a], np.float32)
            every_b = [np.zeros(self.shapes[b], np.float32) for b in each.b.values()]
            for name, part, b in zip(each.b, np.split(a, len(every_b), axis=1), every_b, strict=True):
                self._fill(name, part, b)
            yield a
            yield from every_b
        for name in self._vectors:
            yield np.concatenate(list(rows(self._sources[name], self._expert)))

    def _rank(self, name: str) -> int:
        if name in self._approximated:
            return len(self._approximated[name].b)
        return 0 if name.endswith(LOOKUP) else sum(map(self._delta.rank, self._sources[name].tensors))

    def _size(self, name: str) -> tuple[int, int]:
        """How many values an input of the matrix's kind gives, and of how many it is made: [N, K] of x·a·b."""
        source = self._sources[name.removesuffix(LOOKUP)]
        shapes = [self._expert.shape(tensor) for tensor in source.tensors]
        size = sum(shape[0] for shape in shapes) if source.rows is None else source.rows, shapes[0][1]
        return size[::-1] if name.endswith(LOOKUP) else size

    def _fill(self, name: str, a: np.ndarray, b: np.ndarray) -> None:
        """Write the factors of one matrix into a [K, r] and b [r, N], with the scales of its rows and columns."""
        source = self._sources[name.removesuffix(LOOKUP)]
        if name in self._approximated:
            factors = self._approximated[name]
            rank = len(factors.b)
            a[:, :rank], b[:rank] = factors.a, factors.b
        elif not name.endswith(LOOKUP):
            self._fill_terms(source, a, b)
        if source.column_scale is not None:  # never of an embedding
            a *= source.column_scale[:, None]
        if source.row_scale is not None:
            b *= source.row_scale

    def _fill_terms(self, source: Source, a: np.ndarray, b: np.ndarray) -> None:
        """The terms of the tensors that a matrix is stacked from, in blocks."""
        row = column = 0
        for tensor in source.tensors:
            next_row = row + self._expert.shape(tensor)[0]
            for term in self._delta.terms.get(tensor, ()):
                block = slice(column, column + term.a.shape[0])
                a[:, block] = whole(term.a, tensor).T
                b[block, row:next_row] = whole(term.b, tensor).T * np.float32(term.scale)
                column = block.stop
            row = next_row


def whole(factor: StoredTensor, matrix: str) -> np.ndarray:
    """A factor of a matrix, fp32. Raises InputError where a value is not finite."""
    with factor.open() as read:
        return finite(read(0, factor.shape[0]), matrix, factor)
