"""The `tensorrt` dialect: ONNX's own operators as TensorRT 10.15, 11 and TensorRT-RTX import them, strongly typed.

TensorScatter writes keys and values into buffers of fixed capacity, whose outputs have the inputs' addresses; attention
reads as much of them as `key_positions` is long. Attention is one operator, but for models that cap its scores, which
the importer's Attention refuses: https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md. Products stay
FusedMatMul until a precision scheme replaces them.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from onnxscript.optimizer import fold_constants
from torch import Tensor, nn
from torch.onnx.ops import symbolic
from transformers import AttentionInterface

from fusionroute.fr_export.checkpoints.system import RoutingHead
from fusionroute.fr_export.graphs.dialects import layers, rotary
from fusionroute.fr_export.graphs.dialects.primitive import attend
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.passes import remove_redundant_views, slices_to_split, split_qkv

ATTENTION = "fusionroute_tensorrt"
OPSET = 24  # the first with TensorScatter


class Step:
    """What the attention calls of one forward pass share; travels through the model's keyword arguments.

    past: per layer key and value [1, KV, capacity, D]. write_index [1], positions [S] of the queries, keys [T]:
    positions of the keys.
    """

    def __init__(self, past: list[tuple[Tensor, Tensor]], write_index: Tensor, positions: Tensor, keys: Tensor):
        self.past = past
        self.present: list[tuple[Tensor, Tensor]] = list(past)
        self.write_index, self.positions, self.keys = write_index, positions, keys
        self.masks: dict[int | None, Tensor] = {}

    def written(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values [1, KV, S, D] into the layer's buffers; returns the used part of both, [1, KV, T, D]."""
        key, value = (
            symbolic("::TensorScatter", [past, x, self.write_index], {"axis": -2, "mode": "linear"}, dtype=x.dtype, shape=past.shape, version=24)
            for past, x in zip(self.past[layer], (key, value), strict=True)
        )  # fmt: skip
        self.present[layer] = (key, value)
        used = self.keys.shape[0]
        torch._check(used <= key.shape[2])
        return key[:, :, :used], value[:, :, :used]

    def attended(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None, window: int | None
    ) -> Tensor:
        """What queries [1, H, S, D] read of the layer's keys and values with the new ones [1, KV, S, D]: [1, H, S, D]."""
        keys, values = self.written(layer, key, value)
        mask = self.mask(window)
        return attend(query, [keys], [values], mask, scaling, softcap) if softcap else fused(query, keys, values, mask, scaling)

    def mask(self, window: int | None) -> Tensor:
        """Which keys a query sees, bool [S, T]: none after it, and the last `window` up to itself."""
        if window not in self.masks:
            distance = self.positions[:, None] - self.keys[None]
            self.masks[window] = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        return self.masks[window]


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, scaling: float, step: Step,
    softcap: float | None = None, sliding_window: int | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention interface. query [1, H, S, D], key and value [1, KV, S, D] → output [1, S, H, D]."""
    size = query.shape[-1]
    query, key, value = layers.padded(query, key, value)
    out = step.attended(int(module.layer_idx), query, key, value, scaling, softcap, sliding_window)
    return out[..., :size].transpose(1, 2) if out.shape[-1] != size else out.transpose(1, 2), None


def fused(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Attention as one operator. query [1, H, S, D], keys and values [1, KV, T, D], mask [S, T] → [1, H, S, D]."""
    inputs = [query, keys, values, mask[None, None]]
    return symbolic("::Attention", inputs, {"scale": float(scaling)}, dtype=query.dtype, shape=query.shape, version=24)


AttentionInterface.register(ATTENTION, attention)  # no mask function of this name: transformers then builds no mask

NORM = layers.normalised("::RMSNormalization", 23)


def emitting(model: Any) -> AbstractContextManager[None]:
    """Make the model's linear, norm and attention calls emit this dialect's operators."""
    return layers.emitting(model, ATTENTION, NORM, rotary.by_tables)


class Forward(layers.Model):
    """The signature of the `tensorrt` dialect: ids and KV buffers in, logits and final hidden states of the requested
    positions out.
    """

    Step = Step

    def forward(
        self, input_ids: Tensor, write_index: Tensor, key_positions: Tensor, logit_positions: Tensor, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """input_ids [1, S], write_index [1], key_positions [T], logit_positions [K], past [1, KV, capacity, D] per
        layer.

        Returns logits [1, K, V], hidden [1, K, H], present.
        """
        positions = write_index + torch.arange(input_ids.shape[1])
        step = self.Step(past, write_index, positions, key_positions)
        return *self.answer(input_ids, positions[None], logit_positions, step), step.present


def example(config: Any, max_seq_len: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Example arguments of `Forward` and which of their dimensions vary: not the caches' capacity."""
    length, used = 5, 25
    past = layers.caches(config, max_seq_len)
    ids = torch.ones(1, length, dtype=torch.int64)
    varies = torch.export.Dim.DYNAMIC
    dynamic: tuple[Any, ...] = ({1: varies}, {}, {0: varies}, {0: varies}, [({}, {}) for _ in past])
    return (ids, torch.tensor([used - length]), torch.arange(used), torch.tensor([length - 2, length - 1]), past), dynamic


def names(count: int) -> tuple[list[str], list[str]]:
    """Names of the graph's inputs and outputs, in order, for so many layers."""
    return layers.names(count, ["input_ids", "write_index", "key_positions", "logit_positions"])


def finish(graph: Graph, max_seq_len: int) -> None:
    """The graph passes that pay in this dialect, and dimensions with names that people can read."""
    fold_constants(graph.model)
    remove_redundant_views(graph)
    slices_to_split(graph)
    split_qkv(graph)
    own: dict[str, list[int | str]] = {"input_ids": [1, "sequence"], "key_positions": ["keys"], "logit_positions": ["positions"]}
    layers.name_dimensions(graph, own, max_seq_len)


def end_with(graph: Graph, head: RoutingHead | None) -> None:
    """Turn the hidden output into the router's `routing` [1, K, n] (always fp32), or drop it for an expert."""
    layers.end_with(graph, head, "MatMul", turned=True)
