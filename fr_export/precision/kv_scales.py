"""The steps in which keys and values are stored, from what calibration saw of them."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from fusionroute.calibration.observers import Observer
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.runtime.errors import InputError

# bits → the value that the largest integer stands for, in largest values that calibration saw. Other texts have larger
# ones: with 8 bits clipping loses most, with 4 rounding does (docs/kv-cache.md)
VALUE_RANGE = {8: 1.25, 4: 0.7}
VIEWS = ("Reshape", "Transpose", "Pad", "Identity")  # between a rotary embedding and the attention
KEY, TABLE = 1, {"GroupQueryAttention": 7, "RotaryEmbedding": 2}  # inputs


def caches(graph: Graph) -> dict[str, int]:
    """The caches of a graph, as it names them behind a pass → channels of each."""
    kv_heads, head_size = graph.cache
    return {f"present.{layer}.{kind}": kv_heads * head_size for layer in range(graph.layers) for kind in ("key", "value")}


def kv_scales(graph: Graph, observed: Mapping[str, Observer], bits: int) -> dict[str, np.ndarray]:
    """Cache → its step by channel, float32 [kv_heads, head_size], from the largest value that calibration saw.

    With 8 bits, two channels of a key that the rotary embedding turns into each other share the step of a key that lies in
    one of them whole: at other positions it does, and calibration's texts are shorter than those that come. Raises
    InputError where calibration saw nothing.
    """
    turned = {str(node.outputs[1].name): turned_channels(node) for node in graph.model.graph if node.op_type == "GroupQueryAttention"}
    scales = {}
    for name in caches(graph):
        if name not in observed or not observed[name].rows:
            raise InputError(
                "the calibration table has no ranges of keys and values: calibrate again, or leave out --kv or name fp32 there"
            )
        largest = observed[name].channel_absmax.reshape(graph.cache).copy()
        if name.endswith(".value"):
            largest *= np.float32(VALUE_RANGE[bits])
        elif bits == 8 and (half := turned.get(name, 0) // 2):
            largest[:, :half] = largest[:, half : 2 * half] = np.hypot(largest[:, :half], largest[:, half : 2 * half])
        steps = largest / np.float32(2 ** (bits - 1) - 1)
        scales[name] = np.where(steps < np.finfo(np.float32).tiny, np.float32(1), steps)
    return scales


def turned_channels(attention: ir.Node) -> int:
    """How many channels of each key a rotary embedding turns, in the attention or in front of it: the first ones, channel
    i together with i + half of them.
    """
    node: ir.Node | None = attention
    if "do_rotary" not in attention.attributes:
        key = attention.inputs[KEY]
        node = None if key is None else key.producer()
        while node is not None and node.op_type in VIEWS:
            node = None if node.inputs[0] is None else node.inputs[0].producer()
    table = None if node is None or node.op_type not in TABLE else node.inputs[TABLE[node.op_type]]
    return 0 if table is None or table.shape is None else 2 * int(table.shape[-1])
