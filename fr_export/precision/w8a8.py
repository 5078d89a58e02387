"""W8A8: 8-bit weights with one scale per row, and 8-bit activations with one static scale per product, all symmetric
about zero.

Written as QuantizeLinear and DequantizeLinear around plain products (https://onnx.ai/onnx/operators/), as TensorRT
reads explicit quantisation: symmetric int8, activations per tensor, weights per channel. Products that the plan keeps
at A16 have 8-bit weights only.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from fusionroute.calibration.observe import observe
from fusionroute.calibration.observers import LEVELS, Observer
from fusionroute.fr_export.graphs.decoder_blocks import matrices, reader
from fusionroute.fr_export.graphs.graph import Graph, added, initializer, node, replace_node, users
from fusionroute.fr_export.graphs.stages import stages
from fusionroute.fr_export.graphs.weight_store import Blob, Store
from fusionroute.fr_export.precision.blockwise import SMALLEST_NORMAL, Format, Stored
from fusionroute.fr_export.precision.evidence import pool
from fusionroute.fr_export.precision.fit_context import FitContext
from fusionroute.fr_export.precision.gptq_sequential import round_sequentially
from fusionroute.fr_export.precision.plan_w8a8 import W8A8Plan, choose
from fusionroute.fr_export.precision.products import multiply
from fusionroute.fr_export.precision.rounding import measure
from fusionroute.fr_export.precision.scheme import Fitted, Schemes
from fusionroute.fr_export.precision.smoothquant import for_tensors, smooth
from fusionroute.runtime.errors import InputError


def quantise(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round fp32 rows [R, K] to nearest: int8 [R, K] from −127 to 127, and scales float32 [R] = max|row| / 127 (1 for a
    row of zeros).
    """
    scales = row_scales(rows)
    return np.rint(rows / scales[:, None]).astype(np.int8), scales


def row_scales(rows: np.ndarray) -> np.ndarray:
    """Float32 [R] = max|row| / 127."""
    scales: np.ndarray = np.maximum(rows.max(-1), -rows.min(-1)) / np.float32(LEVELS)
    scales[scales < SMALLEST_NORMAL] = 1  # readers want scales above zero, and the inverse must not overflow
    return scales


class StaticW8A8:
    """8-bit weights and activations, whose scales calibration gives."""

    name = "w8a8"
    bits = 8.1

    def bind(self, graph: Graph, matrix: ir.Value, rows: Iterator[np.ndarray], store: Store) -> None:
        """Raises InputError: there is no static scale without calibration."""
        raise InputError("8-bit activations need the scales of calibration: export them without --calibration none.")

    def fit(self, context: FitContext) -> tuple[Graph, Fitted]:
        """Even out channels, plan, and round the weights by GPTQ; see `fit` below and `scheme.Fitting`."""
        graph, plan, stored = fit(context, by_row)
        return graph, PlannedW8A8(plan, stored)


def fit(context: FitContext, fmt: Callable[[int], Format]) -> tuple[Graph, W8A8Plan, dict[str, Stored]]:
    """Even out channels (SmoothQuant), look at them again, plan, and round the weights by GPTQ, each matrix to
    `fmt(channels)`.

    Evening out costs the weights' accuracy, so it is undone where the plan leaves activations at 16 bits anyway.
    """
    weights, evidence, scales = context.weights, context.evidence, context.shared.scales
    with context.shared.scaling(context.number):
        graph, _ = smooth(context.graph, weights, evidence.observed, for_tensors, taken=dict(scales))
        observed = observe_again(context, graph)
        noise = measure(replace(context, graph=graph), observed)
        left_out = [product.matrix for product in choose(graph, weights, observed, noise).at_a16]
        graph, _ = smooth(context.graph, weights, evidence.observed, for_tensors, taken=scales, leave=left_out)
    plan = choose(graph, weights, observe_again(context, graph), noise)
    formats = {matrix: fmt(channels) for matrix, channels in matrices(graph).items()}
    return graph, plan, round_sequentially(replace(context, graph=graph), formats)


def observe_again(context: FitContext, graph: Graph) -> dict[str, Observer]:
    """Statistics of a graph whose channels are evened out, of all models that read its matrices."""
    statistics = []
    for weights, known in ((context.weights, context.evidence), *context.evidence.sharing):
        embed, read = reader(graph, weights)
        statistics.append(observe(stages(graph), known.recorded, known.masks, embed, read, threads=context.threads, multiply=multiply))
    return pool(statistics)


def about(plan: W8A8Plan) -> dict[str, Any]:
    """A plan for the report."""
    return {"w8a8_share": round(plan.share, 4), "a16": [product.matrix for product in plan.at_a16]}


def by_row(channels: int) -> Format:
    """8 bits with one scale per row."""
    return Format(8, channels, np.dtype(np.float32), False, grid, signed=True)


def grid(rows: np.ndarray, importance: np.ndarray | None = None) -> tuple[np.ndarray, None]:
    """Scales float32 [R, 1] as in `quantise`, for rows of one block."""
    return row_scales(rows[:, 0])[:, None], None


class PlannedW8A8:
    """One model's weights and activations in 8 bits, as its plan says."""

    name = "w8a8"

    def __init__(self, plan: W8A8Plan, stored: Mapping[str, Stored] | None = None):
        self.plan, self.bits = plan, plan.bits
        self._stored = stored or {}

    @property
    def about(self) -> dict[str, Any]:
        """For the report: the share of multiply-adds that are W8A8, and the matrices whose activations stay at 16 bits
        or more.
        """
        return about(self.plan)

    def bind(self, graph: Graph, matrix: ir.Value, rows: Iterator[np.ndarray], store: Store) -> None:
        """Quantise `matrix` [out, in] slice by slice; its products become MatMul between Q/DQ, its look-ups read the
        same bytes.
        """
        inner = graph.model.graph
        out, width = (int(size) for size in matrix.shape)
        name = str(matrix.name)
        values, scales = self._blobs(name, rows, store)
        products, lookups = users(matrix)

        def operand(kind: str, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
            blob = values if kind == "int8" else scales
            return initializer(inner, f"{name}.{kind}", dtype, shape, blob.tensor(f"{name}.{kind}", dtype, shape))

        weight = operand("int8", ir.DataType.INT8, (out, width))
        if products:
            scale = operand("scale", ir.DataType.FLOAT, (out,))
            wide = added(inner, products[0], "DequantizeLinear", [weight, scale], f"{name}.wide", (out, width), axis=0)
            turned = added(inner, products[0], "Transpose", [wide], f"{name}.turned", (width, out), perm=[1, 0])
        for product in products:
            x = product.inputs[0]
            if name in self.plan.scales:
                x = rounded_input(inner, product, ir.tensor(np.array(self.plan.scales[name], np.float32)))
            result = product.outputs[0]
            fresh = ir.Value(name=f"{result.name}.w8a8", type=result.type, shape=result.shape)
            node(inner, product, "MatMul", [x, turned], [fresh])
            replace_node(inner, product, fresh)
        if lookups:
            column = operand("row_scale", ir.DataType.FLOAT, (out, 1))
        for lookup in lookups:
            result, ids = lookup.outputs[0], lookup.inputs[1]
            picked = added(inner, lookup, "Gather", [weight, ids], f"{result.name}.int8", dtype=ir.DataType.INT8, axis=0)
            steps = added(inner, lookup, "Gather", [column, ids], f"{result.name}.scale", axis=0)
            wide = added(inner, lookup, "Cast", [picked], f"{result.name}.wide", to=int(ir.DataType.FLOAT))
            fresh = ir.Value(name=f"{result.name}.w8a8", type=result.type, shape=result.shape)
            node(inner, lookup, "Mul", [wide, steps], [fresh])
            replace_node(inner, lookup, fresh)
        del inner.initializers[name]

    def _blobs(self, name: str, rows: Iterator[np.ndarray], store: Store) -> tuple[Blob, Blob]:
        """Values and scales, as calibration rounded them, or else to nearest."""
        if name in self._stored:
            return self._stored[name].values, self._stored[name].scales
        with store.writer(name) as values, store.writer(name) as scales:
            for part in rows:
                rounded, steps = quantise(part)
                values.write(rounded)
                scales.write(steps)
        return values.blob, scales.blob


def rounded_input(inner: ir.Graph, product: ir.Node, scale: ir.TensorProtocol, narrow: ir.DataType = ir.DataType.INT8) -> ir.Value:
    """A product's input behind QuantizeLinear and DequantizeLinear with a scale of its type, which products of one
    input share. narrow: the type between them.
    """
    x = product.inputs[0]
    for user in x.consumers():
        if user.op_type == "QuantizeLinear":
            return next(iter(user.outputs[0].consumers())).outputs[0]
    parameters = [
        initializer(inner, label, value.dtype, (), ir.tensor(value, name=label))
        for label, value in ((f"{x.name}.scale", scale), (f"{x.name}.zero", ir.tensor(np.zeros((), narrow.numpy()))))
    ]
    small = added(inner, product, "QuantizeLinear", [x, *parameters], f"{x.name}.{narrow.name.lower()}", x.shape, narrow)
    return added(inner, product, "DequantizeLinear", [small, *parameters], f"{x.name}.rounded", x.shape, scale.dtype)


SCHEMES: Schemes = {"ort:cpu": (StaticW8A8(),)}
