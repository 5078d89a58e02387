"""Fill a traced graph with one checkpoint's weights in one precision, tensor by tensor."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

from fusionroute.fr_export.checkpoints.weights import Weights
from fusionroute.fr_export.graphs.graph import INLINE, Graph, users
from fusionroute.fr_export.graphs.source_rows import counted, rows
from fusionroute.fr_export.graphs.weight_store import Store, check_finite
from fusionroute.fr_export.precision.half import TYPES, rounded
from fusionroute.fr_export.precision.scheme import Scheme


def bind(graph: Graph, weights: Weights, scheme: Scheme, store: Store, advance: Callable[[int], None]) -> None:
    """Fill every initialiser. `advance(n)` is told of every n source elements done.

    Matrices that products and look-ups read go through the scheme; norms, biases and tables keep the type they have in
    the graph. Raises InputError where a value lies beyond that type's range.
    """
    inner = graph.model.graph
    for name, source in graph.sources.items():
        value = inner.initializers.get(name)
        if value is None:
            continue  # not used in this graph
        if source.constant is None and len(value.shape) == 2 and any(users(value)):
            scheme.bind(graph, value, counted(rows(source, weights), advance), store)
            continue
        array = source.constant if source.constant is not None else np.concatenate(list(rows(source, weights)))
        array = in_type(np.asarray(array, np.float32), value)
        if array.size <= INLINE:
            check_finite(array, name)
            value.const_value = ir.tensor(array, name=name)
        else:
            value.const_value = store.put(array, name).tensor(name, value.dtype or ir.DataType.FLOAT, array.shape)
    RemoveUnusedNodesPass()(graph.model)
    RemoveUnusedOpsetsPass()(graph.model)


def in_type(array: np.ndarray, value: ir.Value) -> np.ndarray:
    """fp32 values converted to the initialiser's type."""
    half = next((name for name, (_, dtype, _) in TYPES.items() if dtype == value.dtype), None)
    return array if half is None else rounded(array, half, value.name)
