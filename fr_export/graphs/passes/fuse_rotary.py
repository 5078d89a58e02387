"""The rotary embedding of queries and keys moves into the attention that reads them."""

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fusionroute.fr_export.graphs.graph import Graph

COS, SIN = 7, 8  # inputs of GroupQueryAttention


def fuse_rotary(graph: Graph) -> None:
    """RotaryEmbedding → GroupQueryAttention becomes the latter with `do_rotary`, at the same positions.

    Its kernels take heads of a multiple of 16 values, of which a multiple of 16 is turned. Others stay as they are:
    https://github.com/microsoft/onnxruntime/blob/main/onnxruntime/contrib_ops/cpu/bert/group_query_attention_helper.h.
    """
    for attention in [n for n in graph.model.graph if n.op_type == "GroupQueryAttention"]:
        turns = [value.producer() for value in attention.inputs[:2] if value is not None]
        if not all(turn is not None and turn.op_type == "RotaryEmbedding" for turn in turns):
            continue
        (query, _, *tables), (key, _, *_) = (turn.inputs for turn in turns if turn is not None)
        if graph.cache[1] % 16 or int(tables[0].shape[-1]) % 8:
            continue
        attention.resize_inputs(SIN + 1)
        for place, value in ((0, query), (1, key), (COS, tables[0]), (SIN, tables[1])):
            attention.replace_input_with(place, value)
        attention.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 1)
    RemoveUnusedNodesPass()(graph.model)
