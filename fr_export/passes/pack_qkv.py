"""Three projections of one input become one matrix product, which GroupQueryAttention takes as packed QKV."""

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fr_export.graph import Graph, Source, initializer, node


def pack_qkv(graph: Graph) -> None:
    """Stack the rows of query, key and value weights [out, in] wherever all three come straight from products of the same input."""
    inner = graph.model.graph
    for attention in [n for n in inner if n.op_type == "GroupQueryAttention"]:
        products = [made for value in attention.inputs[:3] if value is not None and (made := value.producer()) is not None]
        if len(products) < 3 or any(p.op_type != "FusedMatMul" or p.inputs[1].name not in graph.sources for p in products):
            continue  # a bias, a rotary outside the operator, or a padded head lies between
        query, key, value = products
        if not query.inputs[0] is key.inputs[0] is value.inputs[0]:
            continue
        weights = [p.inputs[1] for p in products]
        width = sum(weight.shape[0] for weight in weights)
        name = weights[0].name.replace("q_proj", "qkv_proj")
        packed = initializer(inner, name, weights[0].dtype, (width, weights[0].shape[1]))
        graph.sources[name] = Source(tuple(tensor for weight in weights for tensor in graph.sources[weight.name].tensors))
        for weight in weights:
            del graph.sources[weight.name]
        x = query.inputs[0]
        out = ir.Value(name=f"{query.outputs[0].name}.qkv", type=x.type, shape=ir.Shape([*x.shape[:-1], width]))
        node(inner, attention, "com.microsoft::FusedMatMul", [x, packed], [out], transB=1)
        attention.replace_input_with(0, out)
        attention.replace_input_with(1, None)
        attention.replace_input_with(2, None)
    RemoveUnusedNodesPass()(graph.model)
