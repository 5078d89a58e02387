"""Quantised matrices in a graph: DequantizeLinear in front of products and look-ups, which TensorRT fuses into them.

An embedding is dequantised before it is looked up, since the builder takes quantised constants nowhere else; engines of
TensorRT-RTX keep the table as it is stored and need no memory for a wide one.
"""

from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

from fusionroute.fr_export.graphs.graph import Graph, initializer, node, users
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision.blockwise import Format, Stored, in_range, nearest, sliced, store_blocks
from fusionroute.fr_export.precision.half import TYPES
from fusionroute.fr_export.precision.qdq.products import multiply

INTEGERS = {8: ir.DataType.INT8, 4: ir.DataType.INT4}
Enter = Callable[[ir.Node], ir.Value]


def round_to_nearest(matrix: ir.Value, rows: Iterator[np.ndarray], fmt: Format, store: Store) -> Stored:
    """A matrix without knowledge of its inputs. Raises InputError where a value is beyond what the format holds."""
    pieces = sliced(in_range(rows, fmt, str(matrix.name)), int(matrix.shape[1]))
    return store_blocks((nearest(piece, fmt) for piece in pieces), fmt, store, str(matrix.name))


def attach(graph: Graph, matrix: ir.Value, stored: Stored, store: Store, enter: Enter | None = None) -> None:
    """Let products and look-ups of `matrix` [out, in] read what is stored, in the type that the matrix has in the
    graph.

    `enter` gives the first operand of a product, which is otherwise what it was.
    """
    inner, fmt = graph.model.graph, stored.format
    name, (out, width) = str(matrix.name), (int(size) for size in matrix.shape)
    blocks = width // fmt.block
    integers = INTEGERS[fmt.bits]
    values = initializer(
        inner, f"{name}.int{fmt.bits}", integers, (out, width), stored.values.tensor(f"{name}.int{fmt.bits}", integers, (out, width))
    )
    by_row = fmt.bits == 8
    shape = (out,) if by_row else (out, blocks)
    scales = store.put(stored.scales.read(fmt.scale_type).astype(numpy_type(matrix.dtype)), str(matrix.name))
    scale = initializer(inner, f"{name}.scale", matrix.dtype, shape, scales.tensor(f"{name}.scale", matrix.dtype, shape))
    widen(graph, matrix, values, scale, enter, **({"axis": 0} if by_row else {"axis": 1, "block_size": fmt.block}))


def widen(graph: Graph, matrix: ir.Value, values: ir.Value, scale: ir.Value, enter: Enter | None = None, **where: int) -> None:
    """Let products and look-ups of `matrix` read DequantizeLinear of narrow values and a scale of the matrix's type.

    where: its attributes, `axis` and `block_size`. enter: see `attach`.
    """
    inner = graph.model.graph
    _, lookups = users(matrix)
    wide = ir.Value(name=f"{matrix.name}.wide", type=ir.TensorType(matrix.dtype), shape=matrix.shape)
    node(inner, first_user(matrix), "DequantizeLinear", [values, scale], [wide], **where)
    multiply(graph, matrix, wide, enter)
    for lookup in lookups:
        lookup.replace_input_with(0, wide)
    del inner.initializers[str(matrix.name)]


def first_user(matrix: ir.Value) -> ir.Node:
    """The node that what dequantises a matrix goes in front of."""
    products, lookups = users(matrix)
    return (lookups or products)[0]


def numpy_type(dtype: ir.DataType) -> np.dtype:
    """Of an activation type."""
    return next((array_type for array_type, kind, _ in TYPES.values() if kind == dtype), np.dtype(np.float32))
