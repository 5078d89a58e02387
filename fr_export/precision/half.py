"""fp16 and bf16: weights in half precision, arithmetic in fp32 (the CPU provider gains nothing from fp16 arithmetic,
and nothing overflows).
"""

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from fusionroute.fr_export.graphs.graph import Graph, node, users
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision.scheme import Schemes
from fusionroute.runtime.errors import InputError

TYPES: dict[str, tuple[np.dtype, ir.DataType, str]] = {
    "fp16": (np.dtype(np.float16), ir.DataType.FLOAT16, "65,504"),
    "bf16": (np.dtype(ml_dtypes.bfloat16), ir.DataType.BFLOAT16, "3.39e38"),
}


def rounded(array: np.ndarray, name: str, label: str | None) -> np.ndarray[Any, Any]:
    """fp32 values in the half precision `name`. Raises InputError where one of the weight `label` lies beyond its
    range.
    """
    dtype, _, largest = TYPES[name]
    with np.errstate(over="ignore"):
        half = array.astype(dtype)
    if not np.isfinite(half).all():
        raise InputError(f"The weight '{label}' holds values beyond {name}'s {largest} (or not finite); export it as fp32 or int8.")
    return half


def store_half(matrix: ir.Value, rows: Iterator[np.ndarray], name: str, store: Store) -> None:
    """Make a matrix one of half precision, with values from the store. Raises InputError as `rounded` does."""
    with store.writer(str(matrix.name)) as writer:
        for part in rows:
            writer.write(rounded(part, name, matrix.name))
    stored = TYPES[name][1]
    matrix.type = ir.TensorType(stored)  # replaced, not changed: clones share it
    matrix.const_value = writer.blob.tensor(matrix.name, stored, tuple(matrix.shape))


class Half:
    """Half the bytes of fp32 on disk, rounded to nearest; ONNX Runtime widens the weights once, when the session is
    loaded.
    """

    bits = 16.0

    def __init__(self, name: str):
        self.name = name

    def bind(self, graph: Graph, matrix: ir.Value, rows: Iterator[np.ndarray], store: Store) -> None:
        """Store half-precision rows and widen after an embedding look-up, before a product.

        Raises InputError where a weight lies beyond the type's range.
        """
        store_half(matrix, rows, self.name, store)
        inner = graph.model.graph
        products, lookups = users(matrix)
        for lookup in lookups:
            narrow, wide = (
                lookup.outputs[0],
                ir.Value(name=f"{lookup.outputs[0].name}.fp32", type=ir.TensorType(ir.DataType.FLOAT)),
            )
            narrow.replace_all_uses_with(wide)
            narrow.type = matrix.type
            inner.insert_after(lookup, ir.Node("", "Cast", [narrow], [ir.AttrInt64("to", int(ir.DataType.FLOAT))], outputs=[wide]))
        if products:
            wide = ir.Value(name=f"{matrix.name}.fp32", type=ir.TensorType(ir.DataType.FLOAT), shape=matrix.shape)
            node(inner, products[0], "Cast", [matrix], [wide], to=int(ir.DataType.FLOAT))
            for product in products:
                product.replace_input_with(1, wide)


SCHEMES: Schemes = {"ort:cpu": (Half("fp16"), Half("bf16"))}
