"""int8-wo, weight-only: 8 bits with one scale per row (8.1 bits per weight); activations stay in half precision."""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from fusionroute.fr_export.graphs.decoder_blocks import matrices
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision.fit_context import FitContext
from fusionroute.fr_export.precision.gptq_sequential import FittedByGptq, round_sequentially
from fusionroute.fr_export.precision.qdq.dequantise import attach, round_to_nearest
from fusionroute.fr_export.precision.qdq.weight_formats import by_row
from fusionroute.fr_export.precision.scheme import Fitted, Schemes


class Int8WeightOnly:
    """The weights' bytes halved, nothing else changed."""

    name = "int8-wo"
    bits = 8.1

    def bind(self, graph: Graph, matrix: ir.Value, rows: Iterator[np.ndarray], store: Store) -> None:
        """Round slice by slice. Raises InputError where a row's scale lies beyond fp16's range."""
        attach(graph, matrix, round_to_nearest(matrix, rows, by_row(int(matrix.shape[1])), store), store)

    def fit(self, context: FitContext) -> tuple[Graph, Fitted]:
        """Round with `round_sequentially`; see `scheme.Fitting`."""
        formats = {name: by_row(width) for name, width in matrices(context.graph).items()}
        return context.graph, FittedByGptq(self, round_sequentially(context, formats), attach)


SCHEMES: Schemes = {"tensorrt": (Int8WeightOnly(),), "tensorrt:10.3": (Int8WeightOnly(),)}
