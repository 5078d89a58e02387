"""fp16 and bf16 throughout: weights for graphs that `passes.to_half` has made, whose activations are in half precision too."""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision.half import store_half
from fusionroute.fr_export.precision.scheme import Schemes


class HalfActivations:
    """Half the bytes of fp32 on disk and in the GPU's memory, rounded to nearest; the same bytes as `Half` stores for the CPU."""

    bits = 16.0

    def __init__(self, name: str):
        self.name = name

    def bind(self, graph: Graph, matrix: ir.Value, rows: Iterator[np.ndarray], store: Store) -> None:
        """Store half-precision rows; no operator changes. Raises InputError where a weight lies beyond the type's range."""
        store_half(matrix, rows, self.name, store)


SCHEMES: Schemes = {"ort:cuda": (HalfActivations("fp16"), HalfActivations("bf16"))}
