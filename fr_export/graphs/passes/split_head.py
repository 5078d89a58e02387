"""The product with the vocabulary in a graph of its own, so that it runs once on what was fused of hidden states."""

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

HIDDEN, LOGITS = "hidden", "logits"
# operators of a head whose logits of a weighted mean are the weighted mean of logits, but for rounding
LINEAR = {"FusedMatMul", "MatMul", "MatMulNBits", "Mul", "Div", "Cast", "Transpose", "QuantizeLinear", "DequantizeLinear"}


def split_head(model: ir.Model) -> ir.Model:
    """Cut the head off a router's graph with weights: it then gives `hidden` float32 [1, K, H] in place of `logits`.

    Returns the head as a model of its own, `hidden` [1, R, H] → `logits` [1, R, V] for any R.
    """
    head = model.clone()
    body = model.graph
    logits = next(value for value in body.outputs if value.name == LOGITS)
    body.outputs[body.outputs.index(logits)] = routed_state(body)
    top = head.graph
    source, result = routed_state(top), next(value for value in top.outputs if value.name == LOGITS)
    rows = ir.Value(name=HIDDEN, type=source.type, shape=source.shape)
    source.name = None
    source.replace_all_uses_with(rows)
    top.inputs[:], top.outputs[:] = [rows], [result]
    for part in (model, head):
        RemoveUnusedNodesPass()(part)
        RemoveUnusedOpsetsPass()(part)
    top.name = "head"
    return head


def shares_head(model: ir.Model) -> bool:
    """Whether the head of a graph for a pair is the same for router and expert: it reads no factors."""
    end = routed_state(model.graph)
    values = [value for value in model.graph.outputs if value.name == LOGITS]
    while values:
        value = values.pop()
        if value.is_graph_input():
            return False
        if value is not end and (producer := value.producer()) is not None:
            values += [each for each in producer.inputs if each is not None]
    return True


def routed_state(graph: ir.Graph) -> ir.Value:
    """The final hidden states that the routing head reads."""
    routing = next(value for value in graph.outputs if value.name == "routing")
    scores = routing.producer().inputs[0]
    return scores.producer().inputs[0]


def is_linear(head: ir.Model) -> bool:
    """Whether a weighted mean of hidden states has the weighted mean of their logits: there is no cap and no bias."""
    return all(node.op_type in LINEAR for node in head.graph)
