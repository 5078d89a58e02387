"""The projections of query, key and value become one matrix product, and their biases one addition: packed QKV for
GroupQueryAttention, or a product that is split again.
"""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fusionroute.fr_export.graphs.graph import Graph, Source, initializer, node

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
PACKED = "qkv_proj"


def pack_qkv(graph: Graph) -> None:
    """As `split_qkv`, and GroupQueryAttention takes the whole product where it reads all three parts as they are.

    Where a norm, a rotary embedding or padding lies between, it reads the parts.
    """
    split_qkv(graph)
    for attention in [n for n in graph.model.graph if n.op_type == "GroupQueryAttention"]:
        split = attention.inputs[0].producer()
        if split is None or split.op_type != "Split" or tuple(attention.inputs[:3]) != tuple(split.outputs):
            continue
        attention.replace_input_with(0, split.inputs[0])
        attention.replace_input_with(1, None)
        attention.replace_input_with(2, None)
    RemoveUnusedNodesPass()(graph.model)


def split_qkv(graph: Graph) -> None:
    """Stack the rows of query, key and value weights [out, in] wherever three products read one input, and split the
    result.

    Every dialect packs the same matrices, so that what is fitted to one dialect's serves the others'.
    """
    inner = graph.model.graph
    for x in list(dict.fromkeys(n.inputs[0] for n in inner if n.op_type == "FusedMatMul")):
        products = projections(graph, x)
        if not products:
            continue
        query = products[0]
        ends = [n.outputs[0] for n in products]
        whole = product(graph, products)
        if biases := added_biases(graph, products):
            whole, ends = sum_of(graph, whole, biases, query), [n.outputs[0] for n in biases]
        widths = [int(n.inputs[1].shape[0]) for n in products]
        label = f"{query.inputs[1].name.replace(PROJECTIONS[0], PACKED)}.widths"
        sizes = initializer(inner, label, ir.DataType.INT64, (3,), ir.tensor(np.array(widths, np.int64), name=label))
        parts = [ir.Value(name=f"{end.name}.part", type=end.type, shape=end.shape) for end in ends]
        node(inner, query, "Split", [whole, sizes], parts, axis=-1)
        for end, part in zip(ends, parts, strict=True):
            end.replace_all_uses_with(part)
    RemoveUnusedNodesPass()(graph.model)


def projections(graph: Graph, x: ir.Value) -> list[ir.Node]:
    """The products that project a value to query, key and value, in this order; none where it is not so read."""
    products = [n for n in x.consumers() if n.op_type == "FusedMatMul" and n.inputs[1].name in graph.sources]
    names = [n.inputs[1].name for n in products]
    fits = len(names) == len(PROJECTIONS) and all(part in name for part, name in zip(PROJECTIONS, names, strict=True))
    return products if fits else []


def added_biases(graph: Graph, products: list[ir.Node]) -> list[ir.Node]:
    """The additions of a weight to each product, if nothing else reads them; none unless all have one."""
    additions = []
    for each in products:
        users = list(each.outputs[0].consumers())
        if len(users) != 1 or users[0].op_type != "Add" or users[0].inputs[1].name not in graph.sources:
            return []
        additions.append(users[0])
    return additions


def product(graph: Graph, products: list[ir.Node]) -> ir.Value:
    """The result of one product with the stacked weights, in front of the first of the products."""
    first = products[0]
    x, matrix = first.inputs[0], stacked(graph, [n.inputs[1] for n in products])
    out = ir.Value(name=f"{first.outputs[0].name}.qkv", type=x.type, shape=ir.Shape([*x.shape[:-1], matrix.shape[0]]))
    node(graph.model.graph, first, "com.microsoft::FusedMatMul", [x, matrix], [out], transB=1)
    return out


def sum_of(graph: Graph, whole: ir.Value, additions: list[ir.Node], before: ir.Node) -> ir.Value:
    """The sum of a packed product and the stacked biases."""
    bias = stacked(graph, [n.inputs[1] for n in additions])
    out = ir.Value(name=f"{whole.name}.biased", type=whole.type, shape=whole.shape)
    node(graph.model.graph, before, "Add", [whole, bias], [out])
    return out


def stacked(graph: Graph, weights: list[ir.Value]) -> ir.Value:
    """One initialiser in place of several, which are stacked along their rows."""
    rows = sum(int(weight.shape[0]) for weight in weights)
    name = weights[0].name.replace(PROJECTIONS[0], PACKED)
    graph.sources[name] = Source(tuple(tensor for weight in weights for tensor in graph.sources[weight.name].tensors))
    for weight in weights:
        del graph.sources[weight.name]
    return initializer(graph.model.graph, name, weights[0].dtype, (rows, *weights[0].shape[1:]))
