"""fp8 for TensorRT: E4M3 weights with one scale per row, and E4M3 activations with one static scale per product.

Four bits of exponent and three of mantissa (https://arxiv.org/abs/2209.05433) keep small values of a tensor with large
ones, so channels need no evening out. Weights are rounded to nearest: steps are not even, and a row's scale only decides
what is largest. Inputs that calibration never saw stay in half precision.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from fusionroute.calibration.observers import Observer
from fusionroute.fr_export.graphs.graph import Graph, initializer
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision.fit_context import FitContext
from fusionroute.fr_export.precision.qdq.dequantise import numpy_type, widen
from fusionroute.fr_export.precision.qdq.weight_formats import stepped
from fusionroute.fr_export.precision.scheme import Fitted, Schemes
from fusionroute.fr_export.precision.w8a8 import rounded_input
from fusionroute.runtime.errors import InputError

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = np.float32(448)  # of E4M3


class Fp8:
    """8-bit weights and activations, whose scales calibration gives."""

    name = "fp8"
    bits = 8.1

    def bind(self, graph: Graph, matrix: ir.Value, rows: Iterator[np.ndarray], store: Store) -> None:
        """Raises InputError: there is no static scale without calibration."""
        raise InputError("Activations in FP8 need the scales of calibration: export them without --calibration none.")

    def fit(self, context: FitContext) -> tuple[Graph, Fitted]:
        """Take the scales of activations from what calibration saw; see `scheme.Fitting`."""
        return context.graph, FittedFp8(context.evidence.observed)


class FittedFp8:
    """One model's weights and activations in FP8. observed: matrix → what enters its products."""

    name, bits = Fp8.name, Fp8.bits

    def __init__(self, observed: Mapping[str, Observer]):
        self.steps = {matrix: step_of(seen, LARGEST) for matrix, seen in observed.items() if seen.rows}

    @property
    def about(self) -> dict[str, Any]:
        """How many matrices have inputs in FP8."""
        return {"fp8_inputs": len(self.steps)}

    def bind(self, graph: Graph, matrix: ir.Value, rows: Iterator[np.ndarray], store: Store) -> None:
        """Round `matrix` [out, in] slice by slice, and what enters its products. Raises InputError as `Writer.write`."""
        inner, name = graph.model.graph, str(matrix.name)
        out, width = (int(size) for size in matrix.shape)
        scales = []
        with store.writer(name) as writer:
            for part in rows:
                values, steps = rounded_rows(part)
                writer.write(values.view(np.uint8))
                scales.append(steps)
        kind = f"{name}.fp8"
        values = initializer(
            inner, kind, ir.DataType.FLOAT8E4M3FN, (out, width), writer.blob.tensor(kind, ir.DataType.FLOAT8E4M3FN, (out, width))
        )
        blob = store.put(np.concatenate(scales).astype(numpy_type(matrix.dtype)), name)
        scale = initializer(inner, f"{name}.scale", matrix.dtype, (out,), blob.tensor(f"{name}.scale", matrix.dtype, (out,)))
        step = self.steps.get(name)

        def enter(product: ir.Node) -> ir.Value:
            assert step is not None
            return rounded_input(inner, product, ir.tensor(step.astype(numpy_type(matrix.dtype))), ir.DataType.FLOAT8E4M3FN)

        widen(graph, matrix, values, scale, enter if step is not None else None, axis=0)


def rounded_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """fp32 rows [R, K] to nearest: E4M3 [R, K], and scales float32 [R], the next numbers of 8 significant bits that are no
    smaller than max|row| / 448.
    """
    scales = stepped(np.maximum(rows.max(-1), -rows.min(-1)) / LARGEST)
    return np.clip(rows / scales[:, None], -LARGEST, LARGEST).astype(E4M3), scales


def step_of(seen: Observer, levels: np.float32) -> np.ndarray:
    """The scale float32 [] at which the largest value that calibration saw becomes `levels`."""
    return stepped(np.asarray(np.float32(seen.absmax()) / levels))


SCHEMES: Schemes = {"tensorrt": (Fp8(),)}
