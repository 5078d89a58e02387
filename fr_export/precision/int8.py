"""int8, weight-only: blocks of 64 along the input axis, one fp32 scale each, symmetric about the zero point 128 (8.5
bits per weight); of 128 (8.25 bits) where calibration has evened out the channels of a matrix.

ONNX Runtime's products round activations in the same blocks. On evened channels blocks of 128 lose no more than blocks
of 64 on uneven ones, and their products are faster, most for two rows and more.
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
from fusionroute.fr_export.precision.kernels import extremes
from fusionroute.fr_export.precision.scheme import Fitted, Schemes
from fusionroute.fr_export.precision.smoothquant import for_blocks, smooth

BLOCK, WIDE = 64, 128


def grid(rows: np.ndarray, importance: np.ndarray | None = None) -> tuple[np.ndarray, None]:
    """Scales float32 [R, blocks] = max|block| / 127; the zero point is 128, which both operators assume where none is
    given.
    """
    low, high = extremes(rows)
    scales = np.maximum(high, -low) / np.float32(127)
    scales[scales < SMALLEST_NORMAL] = 0  # the inverse would overflow; such blocks are zero
    return scales, None


def small_grid(rows: np.ndarray, importance: np.ndarray | None = None) -> tuple[np.ndarray, None]:
    """The same with scales of float16."""
    return grid(rows)[0].astype(np.float16), None


FORMAT = Format(8, BLOCK, np.dtype(np.float32), False, grid)
EVENED = replace(FORMAT, block=WIDE)
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
        graph, evened = context.graph, set[str]()
        carried = carry(graph, context.weights, FORMAT, context.store, context.advance)
        if not carried:  # other scales would round what is carried again
            with context.shared.scaling(context.number):
                graph, alphas = smooth(graph, context.weights, context.evidence.observed, for_blocks, taken=context.shared.scales)
            evened = {name for name, alpha in alphas.items() if alpha is not None}
        widths = {name: width for name, width in matrices(graph).items() if name not in carried}
        # wide blocks where they divide the width: a padded one would be read for nothing
        formats = {name: EVENED if name in evened and width % WIDE == 0 else FORMAT for name, width in widths.items()}
        return graph, carrying(FittedByGptq(self, round_sequentially(replace(context, graph=graph), formats)), carried, graph)


SCHEMES: Schemes = {"ort:cpu": (Int8(),)}
