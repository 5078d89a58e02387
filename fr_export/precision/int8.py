"""int8, weight-only: blocks of 64 along the input axis, one fp32 scale each, symmetric about the zero point 128 (8.5 bits per weight)."""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from fr_export.graph import Graph
from fr_export.precision.blockwise import Format, Quantised, bind_blocks, blocked
from fr_export.store import Store

BLOCK = 64
FORMAT = Format(8, BLOCK, np.dtype(np.float32), zeros=False)
TINY = float(np.finfo(np.float32).tiny)
ZERO_POINT = 128  # what both operators assume for 8 bits where no zero points are given


def quantise(rows: np.ndarray) -> Quantised:
    """Round fp32 rows [R, K] to nearest: scale = max|block| / 127."""
    rows = blocked(rows, BLOCK)
    scales = np.maximum(rows.max(-1), -rows.min(-1)) / np.float32(127)
    scales[scales < TINY] = 0  # the inverse would overflow; such blocks are zero
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    scaled = rows * inverse[..., None]
    np.rint(scaled, out=scaled)
    scaled += ZERO_POINT
    return Quantised(scaled.astype(np.uint8), scales, None)


class Int8:
    """Weights in 8 bits, activations rounded to 8 bits inside the product."""

    name = "int8"
    bits = FORMAT.bits_per_weight

    def bind(self, graph: Graph, matrix: ir.Value, rows: Iterator[np.ndarray], store: Store) -> None:
        """Quantise slice by slice and replace the operators that read the matrix."""
        bind_blocks(graph, matrix, map(quantise, rows), FORMAT, store)
