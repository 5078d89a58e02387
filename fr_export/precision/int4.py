"""int4, weight-only: blocks of 32 along the input axis, each with an fp16 scale and a 4-bit zero point (4.625 bits per weight).

Every block's range is clipped where that lowers its squared rounding error. There is no calibration: products and embedding alike are
rounded to nearest.
"""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from fr_export.graph import Graph
from fr_export.precision.blockwise import Format, Quantised, bind_blocks, blocked
from fr_export.store import Store
from runtime.errors import InputError

BLOCK, TOP = 32, 15
FORMAT = Format(4, BLOCK, np.dtype(np.float16), zeros=True)
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # shares of the block's range that are tried
LARGEST = 65_504 * TOP // 2  # |weight| up to which every scale is finite in fp16
ROWS = 1 << 20  # elements searched at a time: each candidate makes copies


def quantise(rows: np.ndarray) -> Quantised:
    """Round fp32 rows [R, K] to nearest with, per block, the candidate range of least squared error.

    No |value| is beyond LARGEST. A range [low, high] holds 0; scale = (high − low) / 15, rounded to fp16 before use, zero = round(−low / scale).
    """
    rows = blocked(rows, BLOCK)
    low, high = np.minimum(rows.min(-1), 0), np.maximum(rows.max(-1), 0)
    best = np.full(low.shape, np.inf, np.float32)
    values = np.zeros(rows.shape, np.uint8)
    scales, zeros = np.zeros(low.shape, np.float16), np.zeros(low.shape, np.uint8)
    for clip in CLIPS:
        scale = ((high - low) * np.float32(clip / TOP)).astype(np.float16)
        step = scale.astype(np.float32)
        inverse = np.divide(1, step, out=np.zeros_like(step), where=step > 0)  # a block that vanishes in fp16 is zero
        zero = np.clip(np.rint(-low * np.float32(clip) * inverse), 0, TOP)
        rounded = np.clip(np.rint(rows * inverse[..., None]) + zero[..., None], 0, TOP)
        error = np.square((rounded - zero[..., None]) * step[..., None] - rows).sum(-1)
        better = error < best
        best[better], scales[better], zeros[better] = error[better], scale[better], zero[better]
        values[better] = rounded[better]
    return Quantised(values, scales, zeros)


class Int4:
    """Weights in 4 bits, activations rounded to 8 bits inside the product."""

    name = "int4"
    bits = FORMAT.bits_per_weight

    def bind(self, graph: Graph, matrix: ir.Value, rows: Iterator[np.ndarray], store: Store) -> None:
        """Quantise slice by slice and replace the operators that read the matrix.

        Raises InputError where a block's scale could lie beyond fp16's range.
        """
        bind_blocks(graph, matrix, self._parts(matrix, rows), FORMAT, store)

    def _parts(self, matrix: ir.Value, rows: Iterator[np.ndarray]) -> Iterator[Quantised]:
        step = max(1, ROWS // int(matrix.shape[1]))
        for part in rows:
            if max(part.max(), -part.min()) > LARGEST:
                raise InputError(f"The weight '{matrix.name}' holds values beyond the {LARGEST:,} that int4 can hold; export it as int8.")
            for start in range(0, len(part), step):
                yield quantise(part[start : start + step])
