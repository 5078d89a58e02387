"""8 bits by row: the fastest products of several rows that ONNX Runtime has.

Each row of activations is rounded about its own largest value, each row of weights about its own. Where calibration has
evened out the channels of a norm, int8 is written so. Calibration itself records its texts with all matrices as they are:
on SmolLM2 as far from fp32 as 4 bits are (a mean KL divergence of 0.06), good enough to say what a system writes, too
coarse to be shipped.
"""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from fusionroute.calibration.observers import LEVELS
from fusionroute.fr_export.graphs.graph import Graph, added, initializer, replace_node, users
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision.blockwise import stored_value
from fusionroute.fr_export.precision.w8a8 import quantise

ZERO = 128  # activations are unsigned, weights signed: only for these ONNX Runtime uses what processors have for 8 bits
SMALLEST = 1e-30  # of a row's largest value, which is divided by
# behind a matrix's name: what products read of it, and what look-ups read
TURNED, SCALE, TABLE, COLUMN = "int8.turned", "scale", "int8", "scale.column"


class RowInt8:
    """Weights and activations in 8 bits, both with one scale per row."""

    name = "int8"
    bits = 8.1

    def bind(self, graph: Graph, matrix: ir.Value, rows: Iterator[np.ndarray], store: Store) -> None:
        """Quantise slice by slice and replace the operators that read the matrix. One that is both a head and an
        embedding is stored twice, since products read it turned.
        """
        values, scales = (np.concatenate(parts) for parts in zip(*map(quantise, rows), strict=True))
        attach(graph, matrix, values, scales, store)


def attach(graph: Graph, matrix: ir.Value, values: np.ndarray, scales: np.ndarray, store: Store) -> None:
    """Replace the operators that read `matrix` [R, K] by ones that read values int8 [R, K] and scales float32 [R]."""
    inner, name = graph.model.graph, str(matrix.name)
    products, lookups = users(matrix)

    def stored(kind: str, array: np.ndarray, dtype: ir.DataType) -> ir.Value:
        label = f"{name}.{kind}"
        return initializer(inner, label, dtype, array.shape, store.put(array, name).tensor(label, dtype, array.shape))

    if products:
        turned, scale = stored(TURNED, values.T, ir.DataType.INT8), stored(SCALE, scales, ir.DataType.FLOAT)
        for product in products:
            replace_node(inner, product, multiplied(inner, product, turned, scale))
    if lookups:
        table, scale = stored(TABLE, values, ir.DataType.INT8), stored(COLUMN, scales[:, None], ir.DataType.FLOAT)
        for lookup in lookups:
            replace_node(inner, lookup, looked_up(inner, lookup, table, scale))
    del inner.initializers[name]


def attached(graph: Graph, matrix: str) -> np.ndarray | None:
    """The rows float32 [R, K] that operators read since `attach`; None where it was not called."""
    initializers = graph.model.graph.initializers
    turned, scale, table, column = (stored_value(initializers.get(f"{matrix}.{kind}")) for kind in (TURNED, SCALE, TABLE, COLUMN))
    values = None
    if turned is not None and scale is not None:
        values = turned.T * scale[:, None]
    elif table is not None and column is not None:
        values = table * column
    return values


def multiplied(inner: ir.Graph, product: ir.Node, turned: ir.Value, scale: ir.Value) -> ir.Value:
    """The product of rounded rows with a matrix int8 [K, R] whose columns have a scale [R]. ONNX Runtime does once what
    products of one value have in common.
    """
    x, result = product.inputs[0], product.outputs[0]
    shape, name = result.shape, f"{result.name}.row_int8"
    tiny, inverse, one = (constant(inner, value) for value in (np.float32(SMALLEST), np.float32(1 / LEVELS), np.float32(1)))
    zero, last = constant(inner, np.uint8(ZERO)), constant(inner, np.array([-1], np.int64))
    size = added(inner, product, "Abs", [x], f"{name}.size", x.shape)
    largest = added(inner, product, "ReduceMax", [size, last], f"{name}.largest", keepdims=1)
    step = added(inner, product, "Mul", [added(inner, product, "Max", [largest, tiny], f"{name}.some"), inverse], f"{name}.step")
    whole = added(inner, product, "Div", [x, step], f"{name}.levels", x.shape)
    levels = added(inner, product, "QuantizeLinear", [whole, one, zero], f"{name}.uint8", x.shape, ir.DataType.UINT8)
    sums = added(inner, product, "com.microsoft::MatMulIntegerToFloat", [levels, turned, one, scale, zero], f"{name}.sums", shape)
    return added(inner, product, "Mul", [sums, step], f"{name}.product", shape)


def looked_up(inner: ir.Graph, lookup: ir.Node, table: ir.Value, scale: ir.Value) -> ir.Value:
    """Rows of a table int8 [R, K] whose rows have a scale [R, 1]."""
    ids, result = lookup.inputs[1], lookup.outputs[0]
    name = f"{result.name}.row_int8"
    rows = added(inner, lookup, "Gather", [table, ids], f"{name}.rows", result.shape, ir.DataType.INT8)
    wide = added(inner, lookup, "Cast", [rows], f"{name}.fp32", result.shape, to=int(ir.DataType.FLOAT))
    return added(inner, lookup, "Mul", [wide, added(inner, lookup, "Gather", [scale, ids], f"{name}.scale")], f"{name}.row", result.shape)


def constant(inner: ir.Graph, value: np.ndarray | np.generic) -> ir.Value:
    """A constant of these products, which all share."""
    array = np.asarray(value)
    name = f"row_int8.{array.dtype}.{array.reshape(-1)[0]}"
    return inner.initializers.get(name) or initializer(
        inner, name, ir.DataType.from_numpy(array.dtype), array.shape, ir.tensor(array, name=name)
    )
