"""The `portable` dialect: primitive operators of ONNX 20, with the inputs and outputs that Optimum's
ORTModelForCausalLM feeds and reads.

Caches grow by concatenation, what a query sees is read from the attention mask, and logits are given for every
position: https://github.com/huggingface/optimum-onnx/blob/v0.1.0/optimum/onnxruntime/modeling_decoder.py. Norms stay
one operator, which `passes.decompose_rmsnorm` replaces, and products stay FusedMatMul, until a precision is chosen.
"""

from contextlib import AbstractContextManager
from typing import Any

import onnx_ir as ir
import torch
from onnxscript.optimizer import fold_constants
from torch import Tensor, nn
from transformers import AttentionInterface

from fusionroute.fr_export.checkpoints.system import RoutingHead
from fusionroute.fr_export.graphs.dialects import layers, rotary
from fusionroute.fr_export.graphs.dialects.primitive import attend
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.passes import remove_redundant_views, slices_to_split, split_qkv

ATTENTION = "fusionroute_portable"
OPSET = 20  # the first with Gelu(approximate=tanh)
PAST, TOTAL = "past_sequence_length", "past_sequence_length + sequence_length"


class Step:
    """What the attention calls of one forward pass share; travels through the model's keyword arguments.

    past: per layer key and value [B, KV, P, D]. unpadded bool [B, P + S]: the positions that hold no padding.
    """

    def __init__(self, past: list[tuple[Tensor, Tensor]], unpadded: Tensor):
        self.past, self.unpadded = past, unpadded
        self.present: list[tuple[Tensor, Tensor]] = list(past)
        self.masks: dict[int | None, Tensor] = {}

    def appended(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values [B, KV, S, D] behind the layer's caches; returns both, [B, KV, P + S, D]."""
        past_key, past_value = self.past[layer]
        self.present[layer] = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
        return self.present[layer]

    def mask(self, length: int, window: int | None) -> Tensor:
        """Which positions the last `length` see, bool [B, 1, 1, S, P + S]: no padding, none behind, and the last
        `window` with itself.

        Places count, not positions: padding on the left moves both alike.
        """
        if window not in self.masks:
            total = self.unpadded.shape[1]
            distance = (torch.arange(length) + (total - length))[:, None] - torch.arange(total)[None]
            near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            self.masks[window] = near & self.unpadded[:, None, None, None]
        return self.masks[window]


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, scaling: float, step: Step,
    softcap: float | None = None, sliding_window: int | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention interface. query [B, H, S, D], key and value [B, KV, S, D] → output [B, S, H, D]."""
    keys, values = step.appended(int(module.layer_idx), key, value)
    return attend(query, [keys], [values], step.mask(query.shape[2], sliding_window), scaling, softcap).transpose(1, 2), None


AttentionInterface.register(ATTENTION, attention)  # no mask function of this name: transformers then builds no mask

NORM = layers.normalised("::SimplifiedLayerNormalization", 1)


def emitting(model: Any) -> AbstractContextManager[None]:
    """Make the model's linear, norm and attention calls emit this dialect's operators."""
    return layers.emitting(model, ATTENTION, NORM, rotate=None)


class Forward(layers.Model):
    """The signature of a causal LM with a cache; and the final hidden states."""

    def replace_rotary(self, max_seq_len: int) -> None:
        """No tables: positions have no limit but the reader's."""
        rotary.defer(self.model)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """input_ids and position_ids [B, S], attention_mask [B, P + S] (0: padding), past [B, KV, P, D] per layer.

        Returns logits [B, S, V], hidden [B, S, H], present [B, KV, P + S, D] per layer.
        """
        step = Step(past, attention_mask != 0)
        return *self.answer(input_ids, position_ids, 0, step), step.present


def example(config: Any, max_seq_len: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Example arguments of `Forward` and which of their dimensions vary."""
    batch, past, length = 2, 7, 5
    shape = (batch, config.num_key_value_heads, past, config.head_dim)
    caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_hidden_layers)]
    ids, mask = (torch.ones(batch, size, dtype=torch.int64) for size in (length, past + length))
    varies = torch.export.Dim.DYNAMIC
    dynamic: tuple[Any, ...] = (*[{0: varies, 1: varies}] * 3, [({0: varies, 2: varies}, {0: varies, 2: varies}) for _ in caches])
    return (ids, mask, torch.arange(length).expand(batch, -1).contiguous(), caches), dynamic


def names(count: int) -> tuple[list[str], list[str]]:
    """Names of the graph's inputs and outputs, in order, for so many layers."""
    kinds = [f"{layer}.{kind}" for layer in range(count) for kind in ("key", "value")]
    inputs = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{kind}" for kind in kinds)]
    return inputs, ["logits", "hidden", *(f"present.{kind}" for kind in kinds)]


def finish(graph: Graph, max_seq_len: int) -> None:
    """The graph passes that pay in this dialect, and dimensions with the names that Optimum gives them.

    Empty caches may have any number of heads of any size, since Optimum guesses them for families that it does not
    list.
    """
    fold_constants(graph.model)
    remove_redundant_views(graph)
    slices_to_split(graph)
    split_qkv(graph)
    shapes: dict[str, list[int | str]] = {"attention_mask": ["batch_size", TOTAL]}
    for value in (*graph.model.graph.inputs, *graph.model.graph.outputs):
        kind, *_ = value.name.split(".")
        if kind == "past_key_values":
            shape: list[int | str] = ["batch_size", "key_value_heads", PAST, "head_size"]
        elif kind == "present":
            shape = ["batch_size", int(value.shape[1]), TOTAL, int(value.shape[3])]
        else:
            last = [int(value.shape[2])] if len(value.shape) == 3 else []
            shape = shapes.get(kind, ["batch_size", "sequence_length", *last])
        value.shape = ir.Shape(shape)


def end_with(graph: Graph, head: RoutingHead | None) -> None:
    """Drop the hidden output: the signature has no place for routing scores, so a router's head is written beside its
    graph.
    """
    del graph.model.graph.outputs[1]
