"""int8 for TensorRT: W8A8 as explicit quantisation, symmetric, weights by row and activations by tensor.

Products that the plan keeps at A16 read weights in 8 bits and activations in half precision.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision.blockwise import Stored
from fusionroute.fr_export.precision.fit_context import FitContext
from fusionroute.fr_export.precision.plan_w8a8 import W8A8Plan
from fusionroute.fr_export.precision.qdq.dequantise import attach, numpy_type, round_to_nearest
from fusionroute.fr_export.precision.qdq.weight_formats import by_row, stepped
from fusionroute.fr_export.precision.scheme import Fitted, Schemes
from fusionroute.fr_export.precision.w8a8 import StaticW8A8, about, fit, rounded_input


class Int8(StaticW8A8):
    """8-bit weights and activations, whose scales calibration gives."""

    name = "int8"
    bits = 8.1

    def fit(self, context: FitContext) -> tuple[Graph, Fitted]:
        """Even out channels, plan, and round the weights by GPTQ, as `w8a8` does; see `scheme.Fitting`."""
        graph, plan, stored = fit(context, by_row)
        return graph, PlannedInt8(plan, stored)


class PlannedInt8:
    """One model's weights and activations in 8 bits, as its plan says."""

    name = "int8"

    def __init__(self, plan: W8A8Plan, stored: Mapping[str, Stored]):
        self.plan, self._stored = plan, stored
        self.bits = Int8.bits

    @property
    def about(self) -> dict[str, Any]:
        """For the report: the share of multiply-adds that are W8A8, and the matrices whose activations stay in half precision."""
        return about(self.plan)

    def bind(self, graph: Graph, matrix: ir.Value, rows: Iterator[np.ndarray], store: Store) -> None:
        """Round what enters the products of the plan, and take the weights as calibration rounded them, or else to nearest."""
        stored = self._stored.get(str(matrix.name)) or round_to_nearest(matrix, rows, by_row(int(matrix.shape[1])), store)
        step = self.plan.scales.get(str(matrix.name))

        def enter(product: ir.Node) -> ir.Value:
            assert step is not None
            dtype = matrix.dtype
            return rounded_input(graph.model.graph, product, ir.tensor(stepped(np.array(step, np.float32)).astype(numpy_type(dtype))))

        attach(graph, matrix, stored, store, enter if step is not None else None)


SCHEMES: Schemes = {"tensorrt": (Int8(),), "tensorrt:10.3": (Int8(),)}
