"""int4, weight-only: blocks of 64 along the input axis, each with an fp16 scale and a 4-bit zero point (4.31 bits per
weight).

An embedding, with the head that is tied to it, has blocks of 32: every token passes through it.

Every block's range is clipped where that lowers its squared rounding error. With calibration the weights are rounded by
GPTQ, and matrices that it finds sensitive are kept at 8 bits; without, they are rounded to nearest.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import onnx_ir as ir
import torch

from fusionroute.fr_export.graphs.decoder_blocks import matrices
from fusionroute.fr_export.graphs.graph import Graph, users
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision.blockwise import Format, Quantised, attach, in_range, nearest, sliced, store_blocks
from fusionroute.fr_export.precision.carried import carry, carrying
from fusionroute.fr_export.precision.fit_context import FitContext
from fusionroute.fr_export.precision.gptq_sequential import FittedByGptq, round_sequentially
from fusionroute.fr_export.precision.int8 import SMALL
from fusionroute.fr_export.precision.scheme import Fitted, Schemes
from fusionroute.fr_export.precision.sensitive import sensitive

BLOCK, TOP = 64, 15
BUDGET = 5.0  # bits per weight, on average over all matrices, that sensitive ones may bring it to
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # shares of the block's range that are tried


def grid(rows: np.ndarray, importance: np.ndarray | None = None, shares: Sequence[float] = CLIPS) -> tuple[np.ndarray, np.ndarray]:
    """Per block the range of least squared error, weighted by `importance`, of those that are these `shares` of the whole
    one: scales float16 and zeros uint8 [R, blocks].

    A range [low, high] holds 0; scale = (high − low) / 15, rounded to fp16 before use, zero = round(−low / scale).
    """
    count, blocks, block = rows.shape
    turned = torch.from_numpy(rows).permute(1, 2, 0).contiguous()  # operations have long runs of values
    weights = torch.ones(blocks, block) if importance is None else torch.from_numpy(importance)
    low, high = turned.amin(1).clamp_(max=0), turned.amax(1).clamp_(min=0)  # [blocks, R]
    clips = torch.tensor(shares)[:, None, None]
    scales = ((high - low) * (clips / TOP)).half()
    step = scales.float()
    inverse = torch.where(step > 0, 1 / step, 0)  # a block that vanishes in fp16 is zero
    lowest = (low * clips * inverse).round().clamp_(-TOP, 0)
    highest = lowest + TOP
    scaled, off = torch.empty(2, block, count)
    errors = torch.empty(len(shares), blocks, count)
    for clip, at in product(range(len(shares)), range(blocks)):  # so few values stay in a core's cache
        torch.mul(turned[at], inverse[clip, at], out=scaled)
        torch.round(scaled, out=off)
        torch.clamp(off, lowest[clip, at], highest[clip, at], out=off)
        torch.mv(off.sub_(scaled).square_().T, weights[at], out=errors[clip, at])
    errors *= step.square_()
    errors[step == 0] = torch.inf
    best = errors.argmin(0, keepdim=True)
    return scales.gather(0, best)[0].T.numpy(), lowest.gather(0, best)[0].T.neg().to(torch.uint8).numpy()


def whole_range(rows: np.ndarray, importance: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """`grid` without clipping, in a fifth of the time: enough to tell which matrices are more sensitive than others."""
    return grid(rows, shares=(1.0,))


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
        whole = {name: replace(fmt, grid=whole_range) if fmt.grid is grid else fmt for name, fmt in formats.items()}
        formats |= dict.fromkeys(sensitive(context, whole, SMALL, BUDGET), SMALL)
        return graph, carrying(FittedByGptq(self, round_sequentially(context, formats)), carried, graph)


SCHEMES: Schemes = {"ort:cpu": (Int4(),)}
