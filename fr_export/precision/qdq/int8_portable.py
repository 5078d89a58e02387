"""Precisions of the `portable` target: ONNX's own operators, as TensorRT's precisions are, but embeddings are looked up before they are widened.

Activations of int8 stay in fp32; int8 is what TensorRT calls int8-wo: 8 bits with one scale per row (8.1 bits per weight).
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from fusionroute.fr_export.checkpoints.weights import Weights
from fusionroute.fr_export.graphs.decoder_blocks import matrices
from fusionroute.fr_export.graphs.graph import Graph, added, initializer
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision.blockwise import Stored
from fusionroute.fr_export.precision.evidence import Evidence
from fusionroute.fr_export.precision.gptq_sequential import Compensated, compensate
from fusionroute.fr_export.precision.qdq import dequantise
from fusionroute.fr_export.precision.qdq.forms import by_row
from fusionroute.fr_export.precision.qdq.plain import Plain
from fusionroute.fr_export.precision.scheme import Fitted, Scheme, replace, users

FLOAT = ir.DataType.FLOAT


class Int8:
    """The weights' bytes quartered."""

    name = "int8"
    bits = 8.1

    def bind(self, graph: Graph, matrix: ir.Value, rows: Iterator[np.ndarray], store: Store) -> None:
        """Round slice by slice. Raises InputError where a row's scale lies beyond fp16's range."""
        attach(graph, matrix, dequantise.round_to_nearest(matrix, rows, by_row(int(matrix.shape[1])), store), store)

    def fit(
        self, graph: Graph, weights: Weights, known: Evidence, store: Store, shared: dict[str, Any], advance: Callable[[int], None]
    ) -> tuple[Graph, Fitted]:
        """Round with `compensate`; see `scheme.Fitting`."""
        forms = {name: by_row(width) for name, width in matrices(graph).items()}
        stored = compensate(graph, weights, known, forms, store, shared.setdefault("stored", {}), advance)
        return graph, Compensated(self, stored, attach)


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
        replace(inner, lookup, added(inner, lookup, "Mul", [wide, parts[1]], f"{result.name}.int8", result.shape))
    if products:
        dequantise.attach(graph, matrix, stored, store)
    else:
        del inner.initializers[str(matrix.name)]


ALL: tuple[Scheme, ...] = (Plain("fp32"), Plain("fp16"), Int8())
SCHEMES = {scheme.name: scheme for scheme in ALL}
