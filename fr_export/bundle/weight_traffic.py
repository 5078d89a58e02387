"""Bytes of weights that a decoded token reads. They bound the speed of decoding on a memory-bound machine."""

import onnx_ir as ir

# (domain, operator) → its inputs of which a token reads one row: embeddings, and the cosines and sines of rotary
LOOKED_UP: dict[tuple[str, str], tuple[int, ...]] = {
    ("", "Gather"): (0,),
    ("com.microsoft", "GatherBlockQuantized"): (0, 2, 3),
    ("com.microsoft", "GroupQueryAttention"): (7, 8),
    ("com.microsoft", "RotaryEmbedding"): (2, 3),
}
PASSED_ON = {"DequantizeLinear", "Cast"}  # a row of the result needs one row of the input


def weight_bytes(model: ir.Model) -> int:
    """Bytes of a graph's initialisers that one token reads. Of tables that are only looked up it reads one row.

    A tied embedding counts whole, since the head's product reads all of it. Weights behind a cast (half precision on
    the CPU) count as widened, because ONNX Runtime casts them once on loading.
    """
    total = 0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        rows = tensor.shape[0] if len(tensor.shape) else 1
        total += int(tensor.size * widest(value)) // (int(rows) if rows and looked_up(value) else 1)
    return total


def widest(value: ir.Value) -> float:
    """Bytes per element of an initialiser as it is read."""
    assert value.dtype is not None
    casts = [ir.DataType(user.attributes.get_int("to")) for user in value.consumers() if user.op_type == "Cast"]
    return max(float(kind.itemsize) for kind in (casts or [value.dtype]))


def looked_up(value: ir.Value) -> bool:
    """Whether every use of a value reads single rows."""
    uses = [(use.node, use.idx) for use in value.uses()]
    return bool(uses) and all(
        place in LOOKED_UP.get((user.domain, user.op_type), ())
        or (user.op_type in PASSED_ON and not any(out.is_graph_output() for out in user.outputs) and all(map(looked_up, user.outputs)))
        for user, place in uses
    )
