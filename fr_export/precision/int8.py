"""int8, weight-only: blocks of 64 along the input axis, one fp32 scale each, symmetric about the zero point 128 (8.5
bits per weight).
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from fusionroute.fr_export.graphs.decoder_blocks import matrices
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision.blockwise import SMALLEST_NORMAL, Format, Quantised, attach, nearest, store_blocks
from fusionroute.fr_export.precision.carried import carry, carrying
from fusionroute.fr_export.precision.fit_context import FitContext
from fusionroute.fr_export.precision.gptq_sequential import FittedByGptq, round_sequentially
from fusionroute.fr_export.precision.scheme import Fitted, Schemes
from fusionroute.fr_export.precision.smoothquant import smooth

BLOCK = 64


def grid(rows: np.ndarray, importance: np.ndarray | None = None) -> tuple[np.ndarray, None]:
    """Scales float32 [R, blocks] = max|block| / 127; the zero point is 128, which both operators assume where none is
    given.
    """
    scales = np.maximum(rows.max(-1), -rows.min(-1)) / np.float32(127)
    scales[scales < SMALLEST_NORMAL] = 0  # the inverse would overflow; such blocks are zero
    return scales, None


def small_grid(rows: np.ndarray, importance: np.ndarray | None = None) -> tuple[np.ndarray, None]:
    """The same with scales of float16."""
    return grid(rows)[0].astype(np.float16), None


FORMAT = Format(8, BLOCK, np.dtype(np.float32), False, grid)
SMALL = Format(8, BLOCK, np.dtype(np.float16), False, small_grid, 65_504 * 127)  # for the sensitive matrices of int4


def quantise(rows: np.ndarray) -> Quantised:
    """Round fp32 rows [R, K] to nearest."""
    return nearest(rows, FORMAT)


class Int8:
    """Weights in 8 bits, activations rounded to 8 bits inside the product. 8-bit blocks of a checkpoint stay as they are."""

    name = "int8"
    carries = FORMAT
    bits = FORMAT.bits_per_weight

    def bind(self, graph: Graph, matrix: ir.Value, rows: Iterator[np.ndarray], store: Store) -> None:
        """Quantise slice by slice and replace the operators that read the matrix."""
        attach(graph, matrix, store_blocks(map(quantise, rows), FORMAT, store, str(matrix.name)))

    def fit(self, context: FitContext) -> tuple[Graph, Fitted]:
        """Even out channels, for the activations' sake, then round with `round_sequentially`; see `scheme.Fitting`."""
        graph = context.graph
        carried = carry(graph, context.weights, FORMAT, context.store, context.advance)
        if not carried:  # other scales would round what is carried again
            with context.shared.scaling(context.number):
                graph, _ = smooth(graph, context.weights, context.evidence.observed, taken=context.shared.scales)
        formats = {name: FORMAT for name in matrices(graph) if name not in carried}
        return graph, carrying(FittedByGptq(self, round_sequentially(replace(context, graph=graph), formats)), carried, graph)


SCHEMES: Schemes = {"ort:cpu": (Int8(),)}
