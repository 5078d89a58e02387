"""RMS norms of one operator become primitive ones, computed in fp32 whatever the activations are."""

import numpy as np
import onnx_ir as ir

from fusionroute.fr_export.graphs.graph import Graph, added, initializer

FLOAT = ir.DataType.FLOAT
NORMS = ("SimplifiedLayerNormalization", "RMSNormalization")


def decompose_rmsnorm(graph: Graph) -> None:
    """x / √(mean(x²) + ε) in fp32, rounded to the type of x, times the weight: as the models of transformers do.

    The operators are those that ONNX Runtime knows as an RMS norm and fuses again.
    """
    inner = graph.model.graph
    for norm in [n for n in inner if n.op_type in NORMS]:
        x, weight = norm.inputs
        result = norm.outputs[0]
        name, dtype, epsilon = str(result.name), x.dtype or FLOAT, norm.attributes["epsilon"].as_float()
        wide = x if dtype == FLOAT else added(inner, norm, "Cast", [x], f"{name}.wide", x.shape, to=int(FLOAT))
        square = added(inner, norm, "Pow", [wide, constant(inner, "two", np.float32(2))], f"{name}.square", x.shape)
        mean = added(inner, norm, "ReduceMean", [square, constant(inner, "last", np.array([-1], np.int64))], f"{name}.mean", keepdims=1)
        power = added(inner, norm, "Add", [mean, constant(inner, f"epsilon.{epsilon}", np.float32(epsilon))], f"{name}.power")
        root = added(inner, norm, "Sqrt", [power], f"{name}.root")
        even = added(inner, norm, "Div", [wide, root], f"{name}.even", x.shape)
        if dtype != FLOAT:
            even = added(inner, norm, "Cast", [even], f"{name}.narrow", x.shape, dtype, to=int(dtype))
        scaled = added(inner, norm, "Mul", [even, weight], f"{name}.scaled", x.shape, dtype)
        result.replace_all_uses_with(scaled, replace_graph_outputs=True)
        inner.remove(norm, safe=True)
        scaled.name = name


def constant(inner: ir.Graph, name: str, value: np.ndarray | np.float32) -> ir.Value:
    """A small initialiser, which all norms share."""
    array = np.asarray(value)
    label = f"norm.{name}"
    return inner.initializers.get(label) or initializer(
        inner, label, ir.DataType.from_numpy(array.dtype), array.shape, ir.tensor(array, name=label)
    )
