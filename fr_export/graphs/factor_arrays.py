"""What a pair graph's inputs for an expert hold, made from the terms of its delta as `pair_segments` packs matrices."""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from fusionroute.fr_export.checkpoints.deltas import Delta
from fusionroute.fr_export.checkpoints.tensors import StoredTensor
from fusionroute.fr_export.checkpoints.weights import Weights, finite
from fusionroute.fr_export.graphs.graph import Graph, Source
from fusionroute.fr_export.graphs.passes.pair_segments import DELTA, Factors
from fusionroute.fr_export.graphs.source_rows import rows

Shapes = Mapping[str, tuple[int, ...]]  # input → its shape for one expert


class FactorArrays:
    """The inputs of one expert: `shapes`, and in their order `arrays`.

    A matrix that is stacked from several tensors has their factors in blocks. Matrices that read one value have one
    rank, the largest of them and at least 1; what they do not need of it is zero.
    """

    def __init__(self, graph: Graph, factors: Sequence[Factors], vectors: Sequence[str], delta: Delta, expert: Weights):
        self._graph, self._factors, self._vectors, self._delta, self._expert = graph, factors, vectors, delta, expert
        self._ranks = {each.a: max(1, *(sum(map(delta.rank, self._source(name).tensors)) for name in each.b)) for each in factors}

    def _source(self, name: str) -> Source:
        return self._graph.sources[name]

    @property
    def shapes(self) -> Shapes:
        """Of every input that differs between experts."""
        values = self._graph.model.graph.initializers
        shapes: dict[str, tuple[int, ...]] = {}
        for each in self._factors:
            sizes = {name: tuple(map(int, values[name].shape)) for name in each.b}
            rank = self._ranks[each.a]
            shapes[each.a] = (next(iter(sizes.values()))[1], len(sizes) * rank)
            shapes |= {each.b[name]: (rank, out) for name, (out, _) in sizes.items()}
        return shapes | {f"{DELTA}{name}": tuple(map(int, values[name].shape)) for name in self._vectors}

    @property
    def bytes(self) -> int:
        """Of all of them."""
        return 4 * sum(map(math.prod, self.shapes.values()))

    def arrays(self) -> Iterator[np.ndarray]:
        """float32, in the order of `shapes`. Raises InputError where a value is not finite."""
        shapes = self.shapes
        for each in self._factors:
            wide, rank = np.zeros(shapes[each.a], np.float32), self._ranks[each.a]
            narrow = []
            for place, (name, b) in enumerate(each.b.items()):
                narrow.append(np.zeros(shapes[b], np.float32))
                self._fill(self._source(name), wide[:, place * rank : (place + 1) * rank], narrow[-1])
            yield wide
            yield from narrow
        for name in self._vectors:
            yield np.concatenate(list(rows(self._source(name), self._expert)))

    def _fill(self, source: Source, a: np.ndarray, b: np.ndarray) -> None:
        """Write the factors of one matrix into a [K, r] and b [r, N], with the scales that its rows and columns have."""
        row = column = 0
        for tensor in source.tensors:
            stop = row + self._expert.shape(tensor)[0]
            for term in self._delta.terms.get(tensor, ()):
                block = slice(column, column + term.a.shape[0])
                a[:, block] = whole(term.a, tensor).T
                b[block, row:stop] = whole(term.b, tensor).T * np.float32(term.scale)
                column = block.stop
            row = stop
        if source.column_scale is not None:
            a *= source.column_scale[:, None]
        if source.row_scale is not None:
            b *= source.row_scale


def whole(stored: StoredTensor, tensor: str) -> np.ndarray:
    """A factor of the matrix `tensor`, fp32."""
    with stored.open() as read:
        return finite(read(0, stored.shape[0]), tensor, stored)
