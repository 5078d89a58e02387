"""int8, weight-only: blocks of 64 along the input axis, one fp32 scale each, symmetric about the zero point 128 (8.5 bits per weight)."""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from fr_export.graph import Graph, initializer, node
from fr_export.precision.scheme import users
from fr_export.store import Store

BLOCK = 64
TINY = float(np.finfo(np.float32).tiny)
ZERO_POINT = 128  # what both operators assume for 8 bits where no zero points are given


def quantise(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round fp32 rows [R, K] to nearest: uint8 [R, blocks, 64] (padded with zero points) and scales float32 [R, blocks].

    value ≈ (q − 128)·scale, scale = max|block| / 127.
    """
    count, width = rows.shape
    blocks = -(-width // BLOCK)
    if blocks * BLOCK != width:
        rows = np.pad(rows, ((0, 0), (0, blocks * BLOCK - width)))
    rows = rows.reshape(count, blocks, BLOCK)
    scales = np.maximum(rows.max(-1), -rows.min(-1)) / np.float32(127)
    scales[scales < TINY] = 0  # the inverse would overflow; such blocks are zero
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    scaled = rows * inverse[..., None]
    np.rint(scaled, out=scaled)
    scaled += ZERO_POINT
    return scaled.astype(np.uint8), scales


class Int8:
    """com.microsoft MatMulNBits and GatherBlockQuantized; a tied embedding and head read the same bytes."""

    name = "int8"
    bits = 8 + 32 / BLOCK

    def bind(self, graph: Graph, matrix: ir.Value, rows: Iterator[np.ndarray], store: Store) -> None:
        """Quantise slice by slice and replace the operators that read the matrix."""
        with store.writer() as values, store.writer() as scales:
            for part in rows:
                quantised, scale = quantise(part)
                values.write(quantised)
                scales.write(scale)
        inner = graph.model.graph
        out, width = (int(dim) for dim in matrix.shape)
        blocks = -(-width // BLOCK)
        products, lookups = users(matrix)
        shapes = {"product": ((out, blocks, BLOCK), (out * blocks,)), "lookup": ((out, blocks * BLOCK), (out, blocks))}

        def operands(use: str) -> list[ir.Value | None]:
            made: list[ir.Value | None] = []
            for kind, blob, dtype, shape in zip(
                ("int8", "scale"),
                (values.blob, scales.blob),
                (ir.DataType.UINT8, ir.DataType.FLOAT),
                shapes[use],
                strict=True,
            ):
                name = f"{matrix.name}.{kind}.{use}"
                made.append(initializer(inner, name, dtype, shape, blob.tensor(name, dtype, shape)))
            return made

        if products:
            weight = operands("product")
            for product in products:
                result = product.outputs[0]
                fresh = ir.Value(name=f"{result.name}.int8", type=result.type, shape=result.shape)
                node(
                    inner, product, "com.microsoft::MatMulNBits", [product.inputs[0], *weight], [fresh],
                    K=width, N=out, bits=8, block_size=BLOCK, accuracy_level=4,
                )  # fmt: skip
                replace(inner, product, fresh)
        for lookup in lookups:
            result = lookup.outputs[0]
            fresh = ir.Value(name=f"{result.name}.int8", type=result.type, shape=result.shape)
            table, widths = operands("lookup")
            node(
                inner, lookup, "com.microsoft::GatherBlockQuantized", [table, lookup.inputs[1], widths], [fresh],
                bits=8, block_size=BLOCK, gather_axis=0, quantize_axis=1,
            )  # fmt: skip
            if blocks * BLOCK != width:
                fresh = cut(inner, lookup, fresh, width)
            replace(inner, lookup, fresh)
        del inner.initializers[matrix.name]


def replace(inner: ir.Graph, old: ir.Node, fresh: ir.Value) -> None:
    """Let `fresh` stand where the old node's result stood, and remove the node."""
    result = old.outputs[0]
    name = result.name
    result.replace_all_uses_with(fresh, replace_graph_outputs=True)
    inner.remove(old, safe=True)
    fresh.name = name


def cut(inner: ir.Graph, before: ir.Node, padded: ir.Value, width: int) -> ir.Value:
    """Drop the padding of the last block from an embedding row."""
    bounds = [
        initializer(
            inner,
            f"{padded.name}.{kind}",
            ir.DataType.INT64,
            (1,),
            ir.tensor(np.array([at], np.int64), name=f"{padded.name}.{kind}"),
        )
        for kind, at in (("start", 0), ("end", width), ("axis", 2))
    ]
    exact = ir.Value(name=f"{padded.name}.cut", type=padded.type, shape=padded.shape)
    node(inner, before, "Slice", [padded, *bounds], [exact])
    padded.shape = None
    return exact
