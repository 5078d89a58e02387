"""Three projections of one input become one matrix product: packed QKV for GroupQueryAttention, or one that is split again."""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fusionroute.fr_export.graphs.graph import Graph, Source, initializer, node


def pack_qkv(graph: Graph) -> None:
    """Stack the rows of query, key and value weights [out, in] wherever all three come straight from products of the same input."""
    for attention in [n for n in graph.model.graph if n.op_type == "GroupQueryAttention"]:
        products = [product for value in attention.inputs[:3] if value is not None and (product := value.producer()) is not None]
        out = packed(graph, products)
        if out is None:
            continue  # a bias, a rotary outside the operator, or a padded head lies between
        attention.replace_input_with(0, out)
        attention.replace_input_with(1, None)
        attention.replace_input_with(2, None)
    RemoveUnusedNodesPass()(graph.model)


def split_qkv(graph: Graph) -> None:
    """The same for graphs with operators between products and attention; the matrices of `pack_qkv`, so that a fit of those serves here."""
    inner = graph.model.graph
    kv_heads, size = graph.cache
    for x in list(dict.fromkeys(n.inputs[0] for n in inner if n.op_type == "FusedMatMul")):
        products = [n for n in x.consumers() if n.op_type == "FusedMatMul"]
        widths = [int(n.inputs[1].shape[0]) for n in products]
        if len(products) != 3 or size % 16 or widths[1:] != [kv_heads * size] * 2:
            continue
        if any(user.op_type == "Add" for n in products for user in n.outputs[0].consumers()):
            continue  # a bias
        out = packed(graph, products)
        if out is None:
            continue
        parts = [ir.Value(name=f"{n.outputs[0].name}.part", type=out.type, shape=n.outputs[0].shape) for n in products]
        sizes = initializer(
            inner, f"{out.name}.sizes", ir.DataType.INT64, (3,), ir.tensor(np.array(widths, np.int64), name=f"{out.name}.sizes")
        )
        split = ir.Node("", "Split", [out, sizes], [ir.AttrInt64("axis", -1)], outputs=parts)
        inner.insert_after(out.producer(), split)
        for product, part in zip(products, parts, strict=True):
            product.outputs[0].replace_all_uses_with(part)
    RemoveUnusedNodesPass()(graph.model)


def packed(graph: Graph, products: list[ir.Node]) -> ir.Value | None:
    """The result of one product in place of three of the same input, put in front of the first; None where they are no such three."""
    inner = graph.model.graph
    if len(products) < 3 or any(p.op_type != "FusedMatMul" or p.inputs[1].name not in graph.sources for p in products):
        return None
    query, key, value = products
    if not query.inputs[0] is key.inputs[0] is value.inputs[0]:
        return None
    weights = [p.inputs[1] for p in products]
    width = sum(weight.shape[0] for weight in weights)
    name = weights[0].name.replace("q_proj", "qkv_proj")
    matrix = initializer(inner, name, weights[0].dtype, (width, weights[0].shape[1]))
    graph.sources[name] = Source(tuple(tensor for weight in weights for tensor in graph.sources[weight.name].tensors))
    for weight in weights:
        del graph.sources[weight.name]
    x = query.inputs[0]
    out = ir.Value(name=f"{query.outputs[0].name}.qkv", type=x.type, shape=ir.Shape([*x.shape[:-1], width]))
    node(inner, query, "com.microsoft::FusedMatMul", [x, matrix], [out], transB=1)
    return out
