"""Compute on a CPU what a GPU's half-precision graphs compute: its graphs become `ort:cpu` graphs that round alike.

ONNX Runtime's CPU provider has no bf16 kernels. It runs fp16 graphs, but drops a cast to fp16 in front of a product
that it computes in fp32, and the overflow with it. (1.32 also crashes on some fp16 graphs at its highest level.)

An emulated graph computes in fp32 and rounds every result that the GPU's graph holds in half precision. A GPU
accumulates in fp32 too. The results differ only by the order of sums and by the rounding of attention probabilities
inside kernels.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from fusionroute.fr_export.graphs.graph import initializer, node
from fusionroute.runtime.adapters.factor_file import write_factors
from fusionroute.runtime.backends.mapped_factors import map_factors
from fusionroute.runtime.digests import digest_of
from fusionroute.runtime.file_entry import File
from fusionroute.runtime.manifest import Manifest, Pair

FLOAT = ir.DataType.FLOAT


def compute_half_on_cpu(bundle: Path) -> None:
    """Replace a bundle's variants by emulated `ort:cpu` versions of its `ort:cuda` ones. Weights stay as stored."""
    manifest = Manifest.read(bundle)
    files, variants = dict(manifest.files), []
    for variant in manifest.variants:
        if variant.target != "ort:cuda":
            continue
        emulated = {name: name.replace("ort-cuda", "emulated") for name in variant.graph_paths}
        for name, copy in emulated.items():
            ir.save(in_fp32(ir.load(bundle / name)), bundle / copy)
            files[copy] = File.of(digest_of(bundle / copy))
        changes: dict[str, Any] = {"target": "ort:cpu", "graphs": {model: emulated[name] for model, name in variant.graphs.items()}}
        if variant.pair is not None:
            factors = {}
            for expert, name in variant.pair.factors.items():
                arrays = {each: widened(array).astype(np.float32) for each, array in map_factors(bundle / name).items()}
                entries = {each: ("F32", array.shape) for each, array in arrays.items()}
                path, entry = write_factors((bundle / name).parent, expert, entries, arrays.values())
                factors[expert] = path.relative_to(bundle).as_posix()
                files[factors[expert]] = entry
            changes["pair"] = Pair(graph=emulated[variant.pair.graph], factors=factors)
        variants.append(variant.model_copy(update=changes))
    manifest.model_copy(update={"variants": variants, "files": files}).write(bundle)


def widened(factor: np.ndarray) -> np.ndarray:
    """A factor as `map_factors` gives it, whose bf16 values are numbers of 16 bits: in a type that numpy knows."""
    return (factor.astype(np.uint32) << 16).view(np.float32) if factor.dtype == np.uint16 else factor


def in_fp32(model: ir.Model) -> ir.Model:
    """The same model, changed: half-precision values but stored weights are fp32, rounded where they are computed."""
    graph = model.graph
    half = next(value.dtype for value in graph.inputs if value.name.startswith("past."))
    assert half is not None
    for attention in [n for n in graph if n.op_type == "GroupQueryAttention" and n.attributes.get_int("do_rotary", 0)]:
        rotate_before(graph, attention, half)
    for n in list(graph):
        for value in n.outputs:
            if value.dtype == half:
                rounded(graph, n, value, half)
    for value in graph.inputs:
        if value.dtype == half:
            value.type = ir.TensorType(FLOAT)
    first = next(iter(graph))
    for value in list(graph.initializers.values()):
        if value.dtype == half:
            wide = ir.Value(name=f"{value.name}.wide", type=ir.TensorType(FLOAT), shape=value.shape)
            value.replace_all_uses_with(wide)
            node(graph, first, "Cast", [value], [wide], to=int(FLOAT))
    return model


def rounded(graph: ir.Graph, producer: ir.Node, value: ir.Value, half: ir.DataType) -> None:
    """Let all readers of the producer's result `value`, graph outputs too, read fp32 that is rounded to `half`."""
    name = value.name
    wide = ir.Value(name=f"{name}.emulated", type=ir.TensorType(FLOAT), shape=value.shape)
    value.replace_all_uses_with(wide, replace_graph_outputs=True)
    if wide.is_graph_output():
        value.name, wide.name = f"{name}.exact", name
    narrow = value
    steps = []
    if producer.op_type != "Cast":  # a cast rounds by itself
        value.type = ir.TensorType(FLOAT)
        narrow = ir.Value(name=f"{name}.half", type=ir.TensorType(half), shape=value.shape)
        steps = [ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(half))], outputs=[narrow])]
    steps.append(ir.Node("", "Cast", [narrow], [ir.AttrInt64("to", int(FLOAT))], outputs=[wide]))
    graph.insert_after(producer, steps)


def rotate_before(graph: ir.Graph, attention: ir.Node, half: ir.DataType) -> None:
    """Take the rotary embedding out of an attention, so that turned queries and keys are rounded before they meet."""
    query, key, value, *past, total, cos, sin = attention.inputs
    assert cos is not None
    heads, kv = (attention.attributes[label].as_int() for label in ("num_heads", "kv_num_heads"))
    assert past[0] is not None
    name, size, turns = attention.outputs[0].name, int(past[0].shape[-1]), 2 * int(cos.shape[-1])
    part_of_head = {"rotary_embedding_dim": turns} if turns != size else {}
    if key is None:  # packed into the first input
        widths = ir.tensor(np.array([heads, kv, kv], np.int64) * size, name=f"{name}.widths")
        split = initializer(graph, f"{name}.widths", ir.DataType.INT64, (3,), widths)
        packed = query
        query, key, value = (ir.Value(name=f"{name}.{part}", type=ir.TensorType(half)) for part in ("query", "key", "value"))
        node(graph, attention, "Split", [packed, split], [query, key, value], axis=-1)
    length, end, start = (ir.Value(name=f"{name}.{part}") for part in ("length", "end", "start"))
    node(graph, attention, "Shape", [attention.inputs[0]], [length], start=1, end=2)
    node(graph, attention, "Cast", [total], [end], to=int(ir.DataType.INT64))
    node(graph, attention, "Sub", [end, length], [start])  # [1]: the first token's position
    turned = [ir.Value(name=f"{name}.turned.{part}", type=ir.TensorType(half)) for part in ("query", "key")]
    for straight, into, count in zip((query, key), turned, (heads, kv), strict=True):
        node(graph, attention, "com.microsoft::RotaryEmbedding", [straight, start, cos, sin], [into], num_heads=count, **part_of_head)
    for place, changed in enumerate((*turned, value, *past, total, None, None)):
        attention.replace_input_with(place, changed)
    attention.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 0)
