"""The `ort` dialect: ONNX Runtime's contrib operators, KV caches updated in place.

Operators: com.microsoft GroupQueryAttention (rotary inside), FusedMatMul, SkipSimplifiedLayerNormalization; see
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.
"""

import contextlib
import sys
from collections.abc import Iterator
from types import MethodType
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.onnx.ops import symbolic, symbolic_multi_out
from transformers import AttentionInterface

from fr_export.graph import Graph, initializer, node
from fr_export.passes import drop_views, fuse_skip_norm, pack_qkv
from fr_export.system import RoutingHead

ATTENTION = "fusionroute_ort"
OPSET = 20  # the first with Gelu(approximate=tanh)


def rotary_inside(head_size: int) -> bool:
    """GroupQueryAttention's own rotary works on head sizes that are multiples of 16."""
    return head_size % 16 == 0


def cache_head_size(head_size: int) -> int:
    """GroupQueryAttention takes head sizes that are multiples of 8; others are padded with zeros, which change no product."""
    return -(-head_size // 8) * 8


class Step:
    """What the attention calls of one forward pass share; travels through the model's keyword arguments."""

    def __init__(self, past: list[tuple[Tensor, Tensor]], seqlens_k: Tensor, total: Tensor, rotary: tuple[Tensor, Tensor] | None):
        self.past = past
        self.present: list[tuple[Tensor, Tensor]] = list(past)
        self.lengths = [seqlens_k, total]
        self.rotary = rotary


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, scaling: float, step: Step,
    softcap: float | None = None, sliding_window: int | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention interface. query [1, H, S, D], key and value [1, KV, S, D] → output [1, S, H, D]."""
    _, heads, length, size = query.shape
    padded = cache_head_size(size)
    if padded != size:
        query, key, value = (nn.functional.pad(x, (0, padded - size)) for x in (query, key, value))
    q, k, v = (x.transpose(1, 2).reshape(1, length, x.shape[1] * padded) for x in (query, key, value))
    layer = int(module.layer_idx)
    attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": key.shape[1], "scale": float(scaling)}
    attributes["do_rotary"] = int(step.rotary is not None)
    if softcap:
        attributes["softcap"] = float(softcap)
    if sliding_window:
        attributes["local_window_size"] = int(sliding_window)
    past = step.past[layer]
    out, *present = symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        [q, k, v, *past, *step.lengths, *(step.rotary or ())],
        attributes,
        dtypes=(q.dtype, *(x.dtype for x in past)),
        shapes=(q.shape, *(x.shape for x in past)),
        version=1,
    )
    step.present[layer] = (present[0], present[1])
    return out.reshape(1, length, heads, padded)[..., :size] if padded != size else out.reshape(1, length, heads, size), None


AttentionInterface.register(ATTENTION, attention)  # no mask function of this name: transformers then builds no mask


def linear(self: nn.Linear, x: Tensor) -> Tensor:
    """A matrix product with the weight as the checkpoint stores it, [out, in]: no transpose to fold, a tied head needs no copy."""
    y = symbolic(
        "com.microsoft::FusedMatMul",
        [x, self.weight],
        {"transB": 1},
        dtype=x.dtype,
        shape=(*x.shape[:-1], self.out_features),
        version=1,
    )
    return y if self.bias is None else y + self.bias


def norm(self: nn.Module, x: Tensor) -> Tensor:
    """RMSNorm as ONNX Runtime's operator. The weight is read with the family's offset already added."""
    epsilon = float(getattr(self, "variance_epsilon", None) or self.eps)
    return symbolic(
        "::SimplifiedLayerNormalization", [x, self.weight], {"axis": -1, "epsilon": epsilon, "stash_type": 1},
        dtype=x.dtype, shape=x.shape, version=1,
    )  # fmt: skip


@contextlib.contextmanager
def emitting(model: nn.Module) -> Iterator[None]:
    """Make the model's linear, norm and attention calls emit this dialect's operators."""
    model.set_attn_implementation(ATTENTION)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = MethodType(linear, module)
        elif type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(norm, module)
    modeling: Any = sys.modules[type(model).__module__]
    original = modeling.apply_rotary_pos_emb
    if rotary_inside(model.config.head_dim):
        modeling.apply_rotary_pos_emb = lambda query, key, *_, **__: (query, key)
    try:
        yield
    finally:
        modeling.apply_rotary_pos_emb = original


class Forward(nn.Module):
    """The signature of the `ort` dialect: ids and KV buffers in, logits and final hidden states of the wanted positions out."""

    def __init__(self, model: nn.Module, max_seq_len: int):
        super().__init__()
        self.model = model
        self.rotary = rotary_inside(model.config.head_dim)
        if self.rotary:
            for name in ("rotary_cos", "rotary_sin"):
                self.register_buffer(name, torch.zeros(max_seq_len, model.config.head_dim // 2))

    def forward(
        self,
        input_ids: Tensor,
        seqlens_k: Tensor,
        total_sequence_length: Tensor,
        logit_positions: Tensor,
        past: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """input_ids [1, S], logit_positions [K], past [1, KV, capacity, D] per layer → logits [1, K, V], hidden [1, K, H], present."""
        rotary = (self.rotary_cos, self.rotary_sin) if self.rotary else None
        step = Step(past, seqlens_k, total_sequence_length, rotary)
        length = input_ids.shape[1]
        positions = (total_sequence_length.to(torch.int64) - length + torch.arange(length))[None]
        hidden: list[Tensor] = []
        handle = self.model.lm_head.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
        logits = self.model(input_ids=input_ids, position_ids=positions, use_cache=False, logits_to_keep=logit_positions, step=step).logits
        handle.remove()
        return logits, hidden[0], step.present


def example(config: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Example arguments of `Forward` and which of their dimensions vary."""
    length, capacity = 5, 32
    shape = (1, config.num_key_value_heads, capacity, cache_head_size(config.head_dim))
    past = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_hidden_layers)]
    ids = torch.ones(1, length, dtype=torch.int64)
    seqlens, total = torch.tensor([length - 1], dtype=torch.int32), torch.tensor(length, dtype=torch.int32)
    varies = torch.export.Dim.DYNAMIC
    dynamic: tuple[Any, ...] = ({1: varies}, {}, {}, {0: varies}, [({2: varies}, {2: varies}) for _ in past])
    return (ids, seqlens, total, torch.tensor([length - 2, length - 1]), past), dynamic


def names(layers: int) -> tuple[list[str], list[str]]:
    """Names of the graph's inputs and outputs, in order."""
    caches = [f"{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
    inputs = [
        "input_ids",
        "seqlens_k",
        "total_sequence_length",
        "logit_positions",
        *(f"past.{cache}" for cache in caches),
    ]
    return inputs, ["logits", "hidden", *(f"present.{cache}" for cache in caches)]


def finish(graph: Graph) -> None:
    """The graph passes that pay in this dialect, and dimensions with names that people can read."""
    drop_views(graph)
    pack_qkv(graph)
    fuse_skip_norm(graph)
    ends = graph.model.graph
    vocab, hidden = ends.outputs[0].shape[-1], ends.outputs[1].shape[-1]
    shapes: dict[str, list[int | str]] = {
        "input_ids": [1, "sequence"],
        "logit_positions": ["positions"],
        "logits": [1, "positions", vocab],
        "hidden": [1, "positions", hidden],
    }
    for value in (*ends.inputs, *ends.outputs):
        if value.name.startswith(("past.", "present.")):
            value.shape = ir.Shape([1, graph.cache[0], "capacity", graph.cache[1]])
        elif value.name in shapes:
            value.shape = ir.Shape(shapes[value.name])


def end_with(graph: Graph, head: RoutingHead | None) -> None:
    """Turn the hidden output into the router's `routing` [1, K, n] (always fp32), or drop it for an expert."""
    inner = graph.model.graph
    hidden = inner.outputs.pop(1)
    if head is None:
        return
    n = len(head.bias)
    weight = initializer(
        inner,
        "routing_head.weight",
        ir.DataType.FLOAT,
        head.weight.shape,
        ir.tensor(head.weight, name="routing_head.weight"),
    )
    bias = initializer(inner, "routing_head.bias", ir.DataType.FLOAT, head.bias.shape, ir.tensor(head.bias, name="routing_head.bias"))
    scores, routing = (
        ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, "positions", n])) for name in ("scores", "routing")
    )
    node(inner, None, "com.microsoft::FusedMatMul", [hidden, weight], [scores], transB=1)
    node(inner, None, "Add", [scores, bias], [routing])
    inner.outputs.insert(1, routing)
