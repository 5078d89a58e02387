"""Residual addition and the norm that follows it become one operator."""

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fusionroute.fr_export.graphs.graph import Graph, node


def fuse_skip_norm(graph: Graph) -> None:
    """Add → SimplifiedLayerNormalization becomes SkipSimplifiedLayerNormalization, whose fourth output is the sum."""
    inner = graph.model.graph
    for norm in [n for n in inner if n.op_type == "SimplifiedLayerNormalization"]:
        total = norm.inputs[0]
        add = total.producer()
        if add is None or add.op_type != "Add" or any(x is None or x.shape != total.shape for x in add.inputs):
            continue
        out, fused_total = (ir.Value(name=f"{v.name}.fused", type=v.type, shape=v.shape) for v in (norm.outputs[0], total))
        epsilon = norm.attributes["epsilon"].as_float()
        unused = [ir.Value(name=f"{out.name}.{which}") for which in ("mean", "deviation")]
        fused = node(
            inner,
            norm,
            "com.microsoft::SkipSimplifiedLayerNormalization",
            [*add.inputs, norm.inputs[1]],
            [out, *unused, fused_total],
            epsilon=epsilon,
        )
        for value in unused:
            value.name = ""  # left out
        norm.outputs[0].replace_all_uses_with(out)
        # the sum is needed after the norm only: before it, nothing but this norm may use it
        total.replace_all_uses_with(fused_total)
        fused_order(inner, fused, fused_total)
    RemoveUnusedNodesPass()(graph.model)


def fused_order(inner: ir.Graph, fused: ir.Node, fused_total: ir.Value) -> None:
    """Check that no user of the sum stands before the operator that now makes it."""
    position = {n: index for index, n in enumerate(inner)}
    assert all(position[user] > position[fused] for user in fused_total.consumers() if user in position)
