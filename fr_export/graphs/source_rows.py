"""The values of a source, read from a checkpoint slice by slice."""

import hashlib
from collections.abc import Callable, Iterator

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


def digest(parts: Iterator[np.ndarray]) -> str:
    """What values are known by, however they are cut into slices."""
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(np.ascontiguousarray(part).data)
    return sha256.hexdigest()
