"""Precisions of the `portable` target: ONNX's own operators, as TensorRT's precisions are, but embeddings are looked up before they are widened.

Activations of int8 stay in fp32; int8 is what TensorRT calls int8-wo: 8 bits with one scale per row (8.1 bits per weight).
"""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from fusionroute.fr_export.graphs.decoder_blocks import matrices
from fusionroute.fr_export.graphs.graph import Graph, added, initializer, replace_node, users
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision.blockwise import Stored
from fusionroute.fr_export.precision.fit_context import FitContext
from fusionroute.fr_export.precision.gptq_sequential import FittedByGptq, round_sequentially
from fusionroute.fr_export.precision.qdq import dequantise
from fusionroute.fr_export.precision.qdq.weight_formats import by_row
from fusionroute.fr_export.precision.scheme import Fitted, Schemes

FLOAT = ir.DataType.FLOAT


class Int8:
    """The weights' bytes quartered."""

    name = "int8"
    bits = 8.1

    def bind(self, graph: Graph, matrix: ir.Value, rows: Iterator[np.ndarray], store: Store) -> None:
        """Round slice by slice. Raises InputError where a row's scale lies beyond fp16's range."""
        attach(graph, matrix, dequantise.round_to_nearest(matrix, rows, by_row(int(matrix.shape[1])), store), store)

    def fit(self, context: FitContext) -> tuple[Graph, Fitted]:
        """Round with `round_sequentially`; see `scheme.Fitting`."""
        formats = {name: by_row(width) for name, width in matrices(context.graph).items()}
        return context.graph, FittedByGptq(self, round_sequentially(context, formats), attach)


def attach(graph: Graph, matrix: ir.Value, stored: Stored, store: Store) -> None:
    """Let products read what is stored through DequantizeLinear; of an embedding only the rows that were looked up are widened."""
    inner = graph.model.graph
    products, lookups = users(matrix)
    out, width = (int(size) for size in matrix.shape)
    for lookup in lookups:
        result = lookup.outputs[0]
        parts = []
        for kind, blob, dtype, columns in (("rows", stored.values, ir.DataType.INT8, width), ("steps", stored.scales, FLOAT, 1)):
            name = f"{matrix.name}.{kind}"
            table = initializer(inner, name, dtype, (out, columns), blob.tensor(name, dtype, (out, columns)))
            parts.append(added(inner, lookup, "Gather", [table, lookup.inputs[1]], f"{result.name}.{kind}", dtype=dtype, axis=0))
        wide = added(inner, lookup, "Cast", parts[:1], f"{result.name}.wide", result.shape, to=int(FLOAT))
        replace_node(inner, lookup, added(inner, lookup, "Mul", [wide, parts[1]], f"{result.name}.int8", result.shape))
    if products:
        dequantise.attach(graph, matrix, stored, store)
    else:
        del inner.initializers[str(matrix.name)]


SCHEMES: Schemes = {"portable": (Int8(),)}
