"""Remove chains of views that end where they began: transposes that cancel and reshapes back to the same shape."""

import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

from fusionroute.fr_export.graphs.graph import Graph


def remove_redundant_views(graph: Graph) -> None:
    """Bypass every Transpose that undoes the one before it and every Reshape whose result has the shape its chain
    started from.
    """
    for node in graph.model.graph:
        source = undone(node)
        if source is not None:
            node.outputs[0].replace_all_uses_with(source)
    CommonSubexpressionEliminationPass()(graph.model)
    RemoveUnusedNodesPass()(graph.model)


def undone(node: ir.Node) -> ir.Value | None:
    """The value that a view node's result equals, if it is not new."""
    source = node.inputs[0] if node.inputs else None
    before = source.producer() if source is not None else None
    if node.op_type == "Transpose" and before is not None and before.op_type == "Transpose":
        first, second = (tuple(n.attributes["perm"].as_ints()) for n in (before, node))
        return before.inputs[0] if [first[axis] for axis in second] == list(range(len(first))) else None
    if node.op_type == "Reshape":
        while before is not None and before.op_type == "Reshape":
            source = before.inputs[0]
            before = source.producer()
        same = source is not None and source.shape is not None and source.shape == node.outputs[0].shape
        return source if same else None
    return None
