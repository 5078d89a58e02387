"""Slices that share out the result of a product become one Split: what packed projections are to other passes."""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fusionroute.fr_export.graphs.graph import Graph, initializer


def slices_to_split(graph: Graph) -> None:
    """Replace the readers of every product that are Slices along its last axis and cover it without overlap."""
    for product in [n for n in graph.model.graph if n.op_type == "FusedMatMul"]:
        result = product.outputs[0]
        starts = {n: start for n in result.consumers() if (start := sliced_from(n)) is not None}
        slices = sorted(starts, key=starts.__getitem__)
        widths = [int(n.outputs[0].shape[-1]) for n in slices]
        covered = [starts[n] for n in slices] == [0, *np.cumsum(widths)[:-1]] and sum(widths) == int(result.shape[-1])
        if len(slices) > 1 and len(slices) == len(result.consumers()) and covered:
            for n, part in zip(slices, split(graph, result, widths), strict=True):
                n.outputs[0].replace_all_uses_with(part)
    RemoveUnusedNodesPass()(graph.model)


def sliced_from(node: ir.Node) -> int | None:
    """The first index that a Slice of stride 1 along the last axis takes; None for other nodes."""
    if node.op_type != "Slice":
        return None
    start, _, axis, *step = (value.const_value.numpy().item() if value.const_value is not None else None for value in node.inputs[1:])
    last = axis in (-1, len(node.outputs[0].shape) - 1)
    return start if last and step in ([], [1]) and isinstance(node.outputs[0].shape[-1], int) else None


def split(graph: Graph, value: ir.Value, widths: list[int]) -> list[ir.Value]:
    """The parts of these widths along a value's last axis, as a new Split behind it gives them."""
    parts = [
        ir.Value(name=f"{value.name}.{number}", type=value.type, shape=ir.Shape([*value.shape[:-1], width]))
        for number, width in enumerate(widths)
    ]
    name = f"{value.name}.sizes"
    sizes = initializer(graph.model.graph, name, ir.DataType.INT64, (len(widths),), ir.tensor(np.array(widths, np.int64), name=name))
    graph.model.graph.insert_after(value.producer(), ir.Node("", "Split", [value, sizes], [ir.AttrInt64("axis", -1)], outputs=parts))
    return parts
