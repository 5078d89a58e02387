"""The `ort` dialect: ONNX Runtime's contrib operators, KV caches updated in place.

Operators: com.microsoft GroupQueryAttention (rotary inside), RotaryEmbedding, FusedMatMul, SkipSimplifiedLayerNormalization; see
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from onnxscript.optimizer import fold_constants
from torch import Tensor, nn
from torch.onnx.ops import symbolic, symbolic_multi_out
from transformers import AttentionInterface

from fusionroute.fr_export.checkpoints.system import RoutingHead
from fusionroute.fr_export.graphs.dialects import layers
from fusionroute.fr_export.graphs.dialects.rotary import Tables
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.passes import fuse_rotary, fuse_skip_norm, pack_qkv, remove_redundant_views, slices_to_split

ATTENTION = "fusionroute_ort"
OPSET = 20  # the first with Gelu(approximate=tanh)


def rotate(query: Tensor, key: Tensor, tables: Tables, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Queries [1, H, S, D] and keys [1, KV, S, D], turned; `passes.fuse_rotary` puts that into the attention."""
    return turned(query, tables, positions), turned(key, tables, positions)


def turned(x: Tensor, tables: Tables, positions: Tensor) -> Tensor:
    """Heads [1, H, S, D] turned by one operator, at positions [1, S]."""
    _, heads, length, size = x.shape
    dim = 2 * tables[0].shape[-1]
    flat = x.transpose(1, 2).reshape(1, length, heads * size)
    attributes = {"num_heads": heads} | ({"rotary_embedding_dim": dim} if dim != size else {})
    flat = symbolic("com.microsoft::RotaryEmbedding", [flat, positions, *tables], attributes, dtype=x.dtype, shape=flat.shape, version=1)
    return flat.reshape(1, length, heads, size).transpose(1, 2)


class Step:
    """What the attention calls of one forward pass share; travels through the model's keyword arguments."""

    def __init__(self, past: list[tuple[Tensor, Tensor]], seqlens_k: Tensor, total: Tensor):
        self.past = past
        self.present: list[tuple[Tensor, Tensor]] = list(past)
        self.lengths = [seqlens_k, total]


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, scaling: float, step: Step,
    softcap: float | None = None, sliding_window: int | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention interface. query [1, H, S, D], key and value [1, KV, S, D] → output [1, S, H, D]."""
    _, heads, length, size = query.shape
    query, key, value = layers.padded(query, key, value)
    padded = query.shape[-1]
    q, k, v = (x.transpose(1, 2).reshape(1, length, x.shape[1] * padded) for x in (query, key, value))
    layer = int(module.layer_idx)
    attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": key.shape[1], "scale": float(scaling)}
    if softcap:
        attributes["softcap"] = float(softcap)
    if sliding_window:
        attributes["local_window_size"] = int(sliding_window)
    past = step.past[layer]
    out, *present = symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        [q, k, v, *past, *step.lengths],
        attributes,
        dtypes=(q.dtype, *(x.dtype for x in past)),
        shapes=(q.shape, *(x.shape for x in past)),
        version=1,
    )
    step.present[layer] = (present[0], present[1])
    return out.reshape(1, length, heads, padded)[..., :size] if padded != size else out.reshape(1, length, heads, size), None


AttentionInterface.register(ATTENTION, attention)  # no mask function of this name: transformers then builds no mask

NORM = layers.normalised("::SimplifiedLayerNormalization", 1)


def emitting(model: Any) -> AbstractContextManager[None]:
    """Make the model's linear, norm and attention calls emit this dialect's operators."""
    return layers.emitting(model, ATTENTION, NORM, rotate)


class Forward(layers.Model):
    """The signature of the `ort` dialect.

    In: ids and KV buffers. Out: logits and final hidden states of the requested positions.
    """

    def forward(
        self,
        input_ids: Tensor,
        seqlens_k: Tensor,
        total_sequence_length: Tensor,
        logit_positions: Tensor,
        past: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """input_ids [1, S], logit_positions [K], past [1, KV, capacity, D] per layer → logits [1, K, V], hidden [1, K,
        H], present.
        """
        step = Step(past, seqlens_k, total_sequence_length)
        length = input_ids.shape[1]
        positions = (total_sequence_length.to(torch.int64) - length + torch.arange(length))[None]
        return *self.answer(input_ids, positions, logit_positions, step), step.present


def example(config: Any, max_seq_len: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Example arguments of `Forward` and which of their dimensions vary."""
    length = 5
    past = layers.caches(config, 32)
    ids = torch.ones(1, length, dtype=torch.int64)
    seqlens, total = torch.tensor([length - 1], dtype=torch.int32), torch.tensor(length, dtype=torch.int32)
    varies = torch.export.Dim.DYNAMIC
    dynamic: tuple[Any, ...] = ({1: varies}, {}, {}, {0: varies}, [({2: varies}, {2: varies}) for _ in past])
    return (ids, seqlens, total, torch.tensor([length - 2, length - 1]), past), dynamic


def names(count: int) -> tuple[list[str], list[str]]:
    """Names of the graph's inputs and outputs, in order, for so many layers."""
    return layers.names(count, ["input_ids", "seqlens_k", "total_sequence_length", "logit_positions"])


def finish(graph: Graph, max_seq_len: int) -> None:
    """The graph passes that pay in this dialect, and dimensions with names that people can read."""
    fold_constants(graph.model)
    remove_redundant_views(graph)
    fuse_rotary(graph)
    slices_to_split(graph)
    pack_qkv(graph)
    fuse_skip_norm(graph)
    layers.name_dimensions(graph, {"input_ids": [1, "sequence"], "logit_positions": ["positions"]}, "capacity")


def end_with(graph: Graph, head: RoutingHead | None) -> None:
    """Turn the hidden output into the router's `routing` [1, K, n] (always fp32), or drop it for an expert."""
    layers.end_with(graph, head, "com.microsoft::FusedMatMul", turned=False, transB=1)
