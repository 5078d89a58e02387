"""The values of a source, read from a checkpoint slice by slice."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from fusionroute.fr_export.checkpoints.weights import Weights
from fusionroute.fr_export.graphs.graph import Source


def rows(source: Source, weights: Weights) -> Iterator[np.ndarray]:
    """fp32 slices of the stacked tensors of a source, cut, offset and scaled as it says."""
    start = 0
    for tensor in source.tensors:
        for part in weights.rows(tensor, source.rows):
            if source.offset:
                part = part + np.float32(source.offset)
            if source.row_scale is not None:
                scale = source.row_scale[start : start + len(part)]
                part = part * scale.reshape(-1, *[1] * (part.ndim - 1))
            if source.column_scale is not None:
                part = part * source.column_scale
            start += len(part)
            yield part


def counted(parts: Iterator[np.ndarray], advance: Callable[[int], None]) -> Iterator[np.ndarray]:
    """Pass slices through and report their sizes."""
    for part in parts:
        yield part
        advance(part.size)


def digest(source: Source, weights: Weights) -> str:
    """A hash of what a source's values are made of: sources of equal tensors, offsets and scales have equal ones."""
    parts = [weights.digest(tensor, source.rows) for tensor in source.tensors]
    parts += [str(source.offset), *(hashlib.sha256(scale.data).hexdigest() if scale is not None else "" for scale in scales(source))]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def unscaled(source: Source) -> Source:
    """The source without its scales."""
    return replace(source, row_scale=None, column_scale=None)


def scales(source: Source) -> list[np.ndarray | None]:
    """The scales of rows and of columns."""
    return [None if scale is None else np.ascontiguousarray(scale, np.float32) for scale in (source.row_scale, source.column_scale)]
