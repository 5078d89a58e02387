"""int4, weight-only: blocks of 64 along the input axis, each with an fp16 scale and a 4-bit zero point (4.31 bits per
weight).

An embedding, with the head that is tied to it, has blocks of 32: every token passes through it.

Every block's range is clipped where that lowers its squared rounding error. With calibration the weights are rounded by
GPTQ, and matrices that it finds sensitive are kept at 8 bits; without, they are rounded to nearest.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from fusionroute.fr_export.graphs.decoder_blocks import matrices
from fusionroute.fr_export.graphs.graph import Graph, users
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision.blockwise import Format, Quantised, attach, in_range, nearest, sliced, store_blocks
from fusionroute.fr_export.precision.carried import carry, carrying
from fusionroute.fr_export.precision.fit_context import FitContext
from fusionroute.fr_export.precision.gptq_sequential import FittedByGptq, round_sequentially
from fusionroute.fr_export.precision.int8 import SMALL
from fusionroute.fr_export.precision.kernels import best_candidates, extremes
from fusionroute.fr_export.precision.scheme import Fitted, Schemes
from fusionroute.fr_export.precision.sensitive import sensitive

BLOCK, TOP = 64, 15
BUDGET = 5.0  # bits per weight, on average over all matrices, that sensitive ones may bring it to
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # shares of the block's range that are tried


def grid(rows: np.ndarray, importance: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Per block the candidate range of least squared error, weighted by `importance`: scales float16 and zeros uint8
    [R, blocks].

    A range [low, high] holds 0; scale = (high − low) / 15, rounded to fp16 before use, zero = round(−low / scale).
    """
    count, blocks, block = rows.shape
    low, high = extremes(rows)
    clips = np.array(CLIPS, np.float32)[:, None, None]
    scales = ((high - low) * (clips / TOP)).astype(np.float16)
    steps = scales.astype(np.float32)
    inverse = np.divide(1, steps, out=np.zeros_like(steps), where=steps > 0)  # a block that vanishes in fp16 is zero
    zeros = np.clip(np.rint(-low * clips * inverse), 0, TOP)
    best = np.empty((1, count, blocks), np.uint8)
    weights = np.ones((blocks, block), np.float32) if importance is None else importance
    best_candidates(np.ascontiguousarray(rows), weights, steps, zeros, TOP, best[0])
    return np.take_along_axis(scales, best, 0)[0], np.take_along_axis(zeros, best, 0)[0].astype(np.uint8)


FORMAT = Format(4, BLOCK, np.dtype(np.float16), True, grid, 65_504 * TOP / 2)
FINE = replace(FORMAT, block=32)  # for embeddings
# loses more; ONNX Runtime keeps few scales and no widened copies
LEAN = replace(FORMAT, block=128, scale_type=np.dtype(np.float32))


def quantise(rows: np.ndarray) -> Quantised:
    """Round fp32 rows [R, K] to nearest."""
    return nearest(rows, FORMAT)


class Int4:
    """Weights in 4 bits, activations rounded to 8 bits inside the product. 4-bit blocks of a checkpoint stay as they are."""

    name = "int4"
    carries = FORMAT
    most_bits = BUDGET

    def __init__(self, fmt: Format = FORMAT, embedding: Format = FINE):
        self.format, self.embedding = fmt, embedding
        self.bits = max(fmt.bits_per_weight, embedding.bits_per_weight)

    def format_of(self, matrix: ir.Value) -> Format:
        """4 bits, or 8 for an embedding whose rows have an odd number of blocks: ONNX Runtime 1.23 misreads their
        packed zero points.
        """
        if not users(matrix)[1]:
            return self.format
        blocks = -(-int(matrix.shape[1]) // self.embedding.block)
        return SMALL if blocks % 2 else self.embedding

    def bind(self, graph: Graph, matrix: ir.Value, rows: Iterator[np.ndarray], store: Store) -> None:
        """Quantise slice by slice and replace the operators that read the matrix.

        Raises InputError where a block's scale could lie beyond fp16's range.
        """
        fmt = self.format_of(matrix)
        pieces = sliced(in_range(rows, fmt, str(matrix.name)), int(matrix.shape[1]))
        attach(graph, matrix, store_blocks((nearest(piece, fmt) for piece in pieces), fmt, store, str(matrix.name)))

    def fit(self, context: FitContext) -> tuple[Graph, Fitted]:
        """Keep what is sensitive of the others at 8 bits, then round with `round_sequentially`; see `scheme.Fitting`."""
        graph = context.graph
        carried = carry(graph, context.weights, FORMAT, context.store, context.advance)
        formats = {name: self.format_of(graph.model.graph.initializers[name]) for name in matrices(graph) if name not in carried}
        formats |= dict.fromkeys(sensitive(context, formats, SMALL, BUDGET), SMALL)
        return graph, carrying(FittedByGptq(self, round_sequentially(context, formats)), carried, graph)


SCHEMES: Schemes = {"ort:cpu": (Int4(),)}
