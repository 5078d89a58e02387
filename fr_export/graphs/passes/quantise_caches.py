"""Keys and values are stored as integers: GroupQueryAttention rounds what it appends, and reads back integer × scale."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from fusionroute.fr_export.graphs.graph import Graph, Source, initializer

PAST, PRESENT = (3, 4), (1, 2)  # inputs and outputs of GroupQueryAttention
SCALES = (12, 13)  # its inputs
TYPES = {8: (ir.DataType.INT8, 1), 4: (ir.DataType.UINT8, 2)}  # bits → what a cache holds, and values in each


def quantise_caches(graph: Graph, scales: Mapping[str, np.ndarray], bits: int) -> None:
    """Rewrite a graph of the `ort` dialect, before it has weights.

    `scales`: cache, such as `present.0.key` → float32 [kv_heads, head_size], the step of each channel. Keys are stored
    behind their rotary embedding. A cache of 4 bits holds the values of two channels in a byte:
    https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention.
    """
    dtype, packed = TYPES[bits]
    for attention in [n for n in graph.model.graph if n.op_type == "GroupQueryAttention"]:
        attention.resize_inputs(SCALES[-1] + 1)
        for past, present, place in zip(PAST, PRESENT, SCALES, strict=True):
            caches = attention.inputs[past], attention.outputs[present]
            for cache in caches:
                assert cache is not None and cache.shape is not None
                cache.type = ir.TensorType(dtype)
                cache.shape = ir.Shape([*cache.shape[:-1], int(cache.shape[-1]) // packed])
            name = str(caches[1].name)
            kv_heads, head_size = graph.cache
            graph.sources[f"{name}.scale"] = Source(constant=np.ascontiguousarray(scales[name].reshape(1, kv_heads, 1, head_size)))
            step = initializer(graph.model.graph, f"{name}.scale", ir.DataType.FLOAT, (1, kv_heads, 1, head_size))
            attention.replace_input_with(place, step)
        for kind in ("k_quant_type", "v_quant_type"):
            attention.attributes[kind] = ir.AttrString(kind, "PER_CHANNEL")
        attention.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", bits)
