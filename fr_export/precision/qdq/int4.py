"""int4, weight-only: symmetric blocks of 64 (or 32) along the input axis with a scale each (4.25 bits per weight), as
TensorRT reads them.

With calibration the weights are rounded by GPTQ, and matrices that it finds sensitive are kept at 8 bits; without, they
are rounded to nearest.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from fusionroute.fr_export.graphs.decoder_blocks import matrices
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision.fit_context import FitContext
from fusionroute.fr_export.precision.gptq_sequential import FittedByGptq, round_sequentially
from fusionroute.fr_export.precision.int4 import BUDGET
from fusionroute.fr_export.precision.qdq.dequantise import attach, round_to_nearest
from fusionroute.fr_export.precision.qdq.weight_formats import BLOCKS, by_row, in_blocks
from fusionroute.fr_export.precision.scheme import Fitted, Schemes
from fusionroute.fr_export.precision.sensitive import sensitive

# what matrices are measured in, with its size on disk
TYPICAL = replace(in_blocks(BLOCKS[0]), scale_type=np.dtype(np.float16))
WIDE = replace(by_row(1024), scale_type=np.dtype(np.float16))


class Int4:
    """The weights' bytes quartered; activations stay in half precision."""

    name = "int4"
    most_bits = BUDGET
    bits = TYPICAL.bits_per_weight

    def bind(self, graph: Graph, matrix: ir.Value, rows: Iterator[np.ndarray], store: Store) -> None:
        """Round slice by slice. Raises InputError where a block's scale lies beyond fp16's range."""
        attach(graph, matrix, round_to_nearest(matrix, rows, in_blocks(int(matrix.shape[1])), store), store)

    def fit(self, context: FitContext) -> tuple[Graph, Fitted]:
        """Keep what is sensitive at 8 bits, then round with `round_sequentially`; see `scheme.Fitting`."""
        widths = matrices(context.graph)
        at_8_bits = sensitive(context, dict.fromkeys(widths, TYPICAL), WIDE, BUDGET)
        formats = {name: by_row(width) if name in at_8_bits else in_blocks(width) for name, width in widths.items()}
        return context.graph, FittedByGptq(self, round_sequentially(context, formats), attach)


SCHEMES: Schemes = {"tensorrt": (Int4(),)}  # its blocks are ONNX 21's, and TensorRT 10.3 is only said to read up to 20
