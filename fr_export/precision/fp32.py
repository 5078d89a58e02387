"""fp32: the checkpoint's values as they are."""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision.scheme import Schemes


class Fp32:
    """Weights and arithmetic in single precision."""

    name = "fp32"
    bits = 32.0

    def bind(self, graph: Graph, matrix: ir.Value, rows: Iterator[np.ndarray], store: Store) -> None:
        """Store the rows unchanged; no operator changes."""
        with store.writer(str(matrix.name)) as writer:
            for part in rows:
                writer.write(part)
        matrix.const_value = writer.blob.tensor(matrix.name, ir.DataType.FLOAT, tuple(matrix.shape))


SCHEMES: Schemes = {"ort:cpu": (Fp32(),)}
