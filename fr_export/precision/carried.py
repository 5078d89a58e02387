"""Matrices that a checkpoint holds in blocks already: a precision takes over blocks of its width without a second
rounding.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir

from fusionroute.fr_export.checkpoints.stored_blocks import BlockLayout, BlockStored
from fusionroute.fr_export.checkpoints.weights import Weights
from fusionroute.fr_export.graphs.graph import Graph, Source, users
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision.blockwise import PIECE, Format, Quantised, Stored, attach, store_blocks
from fusionroute.fr_export.precision.scheme import Scheme
from fusionroute.runtime.errors import InputError

AnyScheme = TypeVar("AnyScheme", bound=Scheme)


class Carried:
    """A scheme for one model, but for the matrices `stored` (by name) that were taken over. `others` counts the values
    of the matrices that are left to `rest`.
    """

    def __init__(self, rest: Scheme, stored: Mapping[str, Stored], others: int):
        values = sum(each.values.length * 8 // each.format.bits for each in stored.values())
        self.name, self.bits = rest.name, (sum(each.bytes for each in stored.values()) * 8 + rest.bits * others) / (values + others)
        self._rest, self._stored = rest, stored

    @property
    def about(self) -> dict[str, Any]:
        """For the report: the number of matrices taken over, and what the report says of the rest."""
        return {**getattr(self._rest, "about", {}), "carried": len(self._stored)}

    def bind(self, graph: Graph, matrix: ir.Value, rows: Iterator[np.ndarray], store: Store) -> None:
        """Replace the operators that read the matrix."""
        if matrix.name in self._stored:
            attach(graph, matrix, self._stored[matrix.name])
        else:
            self._rest.bind(graph, matrix, rows, store)


def carry(graph: Graph, weights: Weights, like: Format, store: Store, advance: Callable[[int], None]) -> dict[str, Stored]:
    """Store every matrix of the graph whose source lies in blocks of as many bits as the format `like` has; by name.

    `advance(n)` is told of every n values done. Raises InputError where a scale is not finite.
    """
    stored = {}
    for name, source in graph.sources.items():
        matrix = graph.model.graph.initializers.get(name)
        if matrix is None or source.constant is not None or len(matrix.shape) != 2 or not any(users(matrix)):
            continue
        layout = layout_of(source, weights)
        if layout is None or layout.bits != like.bits or not readable(matrix, layout):
            continue
        fmt = replace(like, block=layout.block, scale_type=layout.scale_type, zeros=layout.zeros)
        stored[name] = store_blocks(blocks_of(source, weights, advance), fmt, store, name)
    return stored


def carrying(scheme: AnyScheme, stored: Mapping[str, Stored], graph: Graph) -> AnyScheme | Carried:
    """The scheme for a model of which `stored` was taken over."""
    if not stored:
        return scheme
    values = graph.model.graph.initializers
    sizes = {name: int(np.prod(values[name].shape)) for name, source in graph.sources.items() if source.tensors and name in values}
    matrices = {name: size for name, size in sizes.items() if len(values[name].shape) == 2}
    return Carried(scheme, stored, sum(matrices.values()) - sum(matrices[name] for name in stored))


def layout_of(source: Source, weights: Weights) -> BlockLayout | None:
    """How all tensors of a source lie in blocks; None where one does not, where they differ, or where values change."""
    if source.offset or source.row_scale is not None or source.column_scale is not None:
        return None
    entries = [weights.entry(name) for name in source.tensors]
    layouts = {entry.layout if isinstance(entry, BlockStored) else None for entry in entries}
    return layouts.pop() if len(layouts) == 1 else None


def readable(matrix: ir.Value, layout: BlockLayout) -> bool:
    """Whether the operators that read the matrix can read such blocks: ONNX Runtime 1.23 misreads an embedding's packed
    zero points where a row has an odd number of blocks.
    """
    odd = int(matrix.shape[1]) // layout.block % 2
    return not (users(matrix)[1] and layout.zeros and layout.bits == 4 and odd)


def blocks_of(source: Source, weights: Weights, advance: Callable[[int], None]) -> Iterator[Quantised]:
    """The blocks of the stacked tensors of a source, in slices. Raises InputError where a scale is not finite."""
    for name in source.tensors:
        entry = weights.entry(name)
        assert isinstance(entry, BlockStored)
        total = entry.shape[0] if source.rows is None else min(source.rows, entry.shape[0])
        step = max(1, PIECE // entry.shape[1])
        with entry.open_blocks() as read:
            for start in range(0, total, step):
                part = Quantised(*read(start, min(start + step, total)))
                if not np.isfinite(part.scales).all():
                    raise InputError(f"Tensor '{name}' in {entry.files[0]} holds scales that are not finite; download it again.")
                yield part
                advance(part.values.size)
