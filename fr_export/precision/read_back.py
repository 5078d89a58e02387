"""A matrix as the operators of a bound graph read it."""

import numpy as np
import onnx_ir as ir

from fusionroute.fr_export.checkpoints.weights import Weights
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.source_rows import rows, unscaled
from fusionroute.fr_export.precision import row_int8
from fusionroute.fr_export.precision.blockwise import attached

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def read_back(graph: Graph, matrix: str, weights: Weights) -> np.ndarray:
    """float32 [N, K], rounded as it is stored, without the scales of its source.

    Where the precision stores neither blocks nor rows nor floats (w8a8), the checkpoint's values.
    """
    source, initialiser = graph.sources[matrix], graph.model.graph.initializers.get(matrix)
    values = attached(graph, matrix, weights.shape(source.tensors[0])[1])
    values = row_int8.attached(graph, matrix) if values is None else values
    if values is None and initialiser is not None and initialiser.dtype in FLOATS and initialiser.const_value is not None:
        values = initialiser.const_value.numpy().astype(np.float32)
    if values is None:
        return np.concatenate(list(rows(unscaled(source), weights)))
    if source.row_scale is not None:
        values = values / source.row_scale[:, None]
    if source.column_scale is not None:
        values = values / source.column_scale
    return values
