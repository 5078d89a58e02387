"""Layers with a sliding window learn how long the text is by inputs of their own, so that they need not see all of it."""

import onnx_ir as ir

from fusionroute.fr_export.graphs.graph import Graph, added, initializer
from fusionroute.runtime.limits import WINDOW
from fusionroute.runtime.window import Window

PAST, LENGTHS, POSITIONS = 3, (5, 6), 9  # inputs of GroupQueryAttention
INT32, INT64 = ir.DataType.INT32, ir.DataType.INT64


def window_inputs(graph: Graph, capacity: int) -> Window | None:
    """Rewrite a graph of the `ort` dialect, whose caches hold `capacity` tokens; None where no window is shorter.

    Attention takes a cache whose first token is not the text's: the inputs `window.…` count from that token on. Rotary
    embeddings stay those of positions in the text, which the graph then computes.
    """
    inner = graph.model.graph
    attentions = [each for each in inner if each.op_type == "GroupQueryAttention" and "local_window_size" in each.attributes]
    sizes = [each.attributes["local_window_size"].as_int() for each in attentions]
    if not sizes or max(sizes) >= capacity:
        return None
    lengths = [attentions[0].inputs[place] for place in LENGTHS]
    own = []
    for value in lengths:
        assert value is not None
        own.append(ir.Value(name=f"{WINDOW}{value.name}", type=ir.TensorType(INT32), shape=value.shape))
    inner.inputs.extend(own)
    positions = positions_of(graph) if any("do_rotary" in each.attributes for each in attentions) else None
    for attention in attentions:
        for place, value in zip(LENGTHS, own, strict=True):
            attention.replace_input_with(place, value)
        if "do_rotary" in attention.attributes:
            attention.resize_inputs(max(len(attention.inputs), POSITIONS + 1))
            attention.replace_input_with(POSITIONS, positions)
    layers = [int(str(value.name).split(".")[1]) for each in attentions if (value := each.inputs[PAST]) is not None]
    return Window(tokens=max(sizes), layers=sorted(layers))


def positions_of(graph: Graph) -> ir.Value:
    """The positions of the tokens that a pass reads, int64 [1, S]: the last of the text's."""
    inner = graph.model.graph
    ids, total = (next(each for each in inner.inputs if each.name == name) for name in ("input_ids", "total_sequence_length"))
    first = next(iter(inner))
    one = initializer(inner, "positions.one", INT64, (), ir.tensor(1, dtype=INT64))
    axis = initializer(inner, "positions.axis", INT64, (1,), ir.tensor([0], dtype=INT64))
    end = added(inner, first, "Cast", [total], "positions.end", (), INT64, to=int(INT64))
    length = added(inner, first, "Shape", [ids], "positions.length", (1,), INT64, start=1)
    count = added(inner, first, "Squeeze", [length], "positions.count", (), INT64)
    start = added(inner, first, "Sub", [end, count], "positions.start", (), INT64)
    row = added(inner, first, "Range", [start, end, one], "positions.row", None, INT64)
    return added(inner, first, "Unsqueeze", [row, axis], "positions", None, INT64)
