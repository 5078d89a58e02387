"""int8, weight-only: blocks of 64 along the input axis, one fp32 scale each, symmetric about the zero point 128 (8.5
bits per weight). Where calibration has evened out the channels of a matrix, blocks of 128 (8.25 bits), or one scale per
row (8 bits) if the matrix is wide and one of gate and up, behind a norm.

ONNX Runtime's products round activations in the same blocks. On evened channels blocks of 128, and whole rows behind a
norm, lose no more than blocks of 64 on uneven ones, and their products are faster, most for two rows and more.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from fusionroute.fr_export.graphs.decoder_blocks import matrices
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision import row_int8
from fusionroute.fr_export.precision.blockwise import SMALLEST_NORMAL, Format, Quantised, Stored, attach, nearest, store_blocks
from fusionroute.fr_export.precision.carried import carry, carrying
from fusionroute.fr_export.precision.fit_context import FitContext
from fusionroute.fr_export.precision.gptq_sequential import FittedByGptq, in_blocks, round_sequentially
from fusionroute.fr_export.precision.kernels import extremes
from fusionroute.fr_export.precision.scheme import Fitted, Schemes
from fusionroute.fr_export.precision.smoothquant import NORMS, for_blocks, smooth
from fusionroute.fr_export.precision.w8a8 import by_row

BLOCK, WIDE = 64, 128
ATTENTION = "self_attn"  # in the names of its matrices
ROWS = 1024  # channels from which on a product by row is faster, with its own rounding of activations, than one by block


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
        normed = behind_norms(graph)
        formats = {name: format_of(width, name in evened, name in normed) for name, width in widths.items()}
        stored = round_sequentially(replace(context, graph=graph), formats)
        return graph, carrying(FittedByGptq(self, stored, attach_stored), carried, graph)


def format_of(width: int, evened: bool, normed: bool) -> Format:
    """Of a matrix with so many channels, which are `evened` or not, and `normed` if a norm gives what it reads."""
    if evened and normed and width >= ROWS:
        return by_row(width)
    # wide blocks where they divide the width: a padded one would be read for nothing
    return EVENED if evened and width % WIDE == 0 else FORMAT


def behind_norms(graph: Graph) -> set[str]:
    """The matrices beside attention that read what a norm gives: gate and up. One token's values have about the size of
    another's there. Query, key and value read such too, but lose more by row, and gain less.
    """
    norms = (each for each in graph.model.graph if each.op_type in NORMS)
    products = (each for norm in norms for each in norm.outputs[0].consumers() if each.op_type == "FusedMatMul")
    return {name for product in products if ATTENTION not in (name := str(product.inputs[1].name))}


def attach_stored(graph: Graph, matrix: ir.Value, stored: Stored, store: Store) -> None:
    """Let the operators of its format read a stored matrix."""
    if not stored.format.signed:
        in_blocks(graph, matrix, stored, store)
        return
    scales = stored.scales.read(np.dtype(np.float32))
    row_int8.attach(graph, matrix, stored.values.read(np.dtype(np.int8)).reshape(len(scales), -1), scales, store)


SCHEMES: Schemes = {"ort:cpu": (Int8(),)}
