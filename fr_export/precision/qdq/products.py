"""Products of activations with a matrix [out, in], in ONNX's own operators."""

from collections.abc import Callable

import onnx_ir as ir

from fusionroute.fr_export.graphs.graph import Graph, node, replace_node, users


def multiply(graph: Graph, matrix: ir.Value, weight: ir.Value, enter: Callable[[ir.Node], ir.Value] | None = None) -> None:
    """Replace the products that read `matrix` by MatMul with `weight` [out, in] transposed; `enter` may give products another input."""
    inner = graph.model.graph
    products, _ = users(matrix)
    if not products:
        return
    turned = ir.Value(name=f"{matrix.name}.turned", type=weight.type, shape=ir.Shape(list(weight.shape)[::-1]))
    node(inner, products[0], "Transpose", [weight], [turned], perm=[1, 0])
    for product in products:
        result = product.outputs[0]
        fresh = ir.Value(name=f"{result.name}.product", type=result.type, shape=result.shape)
        node(inner, product, "MatMul", [enter(product) if enter else product.inputs[0], turned], [fresh])
        replace_node(inner, product, fresh)
