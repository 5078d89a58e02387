"""fp32, fp16 and bf16 for TensorRT: weights in the activations' type."""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision.fp32 import Fp32
from fusionroute.fr_export.precision.half import TYPES
from fusionroute.fr_export.precision.half_activations import HalfActivations
from fusionroute.fr_export.precision.qdq.products import multiply
from fusionroute.fr_export.precision.scheme import Scheme, Schemes


class Plain:
    """Weights as `ort:cuda` stores them; products are MatMul with the transposed matrix, which TensorRT folds."""

    def __init__(self, name: str):
        self.name = name
        self._stored: Scheme = HalfActivations(name) if name in TYPES else Fp32()
        self.bits = self._stored.bits

    def bind(self, graph: Graph, matrix: ir.Value, rows: Iterator[np.ndarray], store: Store) -> None:
        """Store the rows and rewrite the products. Raises InputError where a weight lies beyond the type's range."""
        self._stored.bind(graph, matrix, rows, store)
        multiply(graph, matrix, matrix)


SCHEMES: Schemes = {
    "portable": (Plain("fp32"), Plain("fp16")),
    "tensorrt": (Plain("fp32"), Plain("fp16"), Plain("bf16")),
    "tensorrt:10.3": (Plain("fp32"), Plain("fp16"), Plain("bf16")),
}
