"""The `tensorrt:10.3` dialect: the `tensorrt` one in operators that TensorRT 10.3 (JetPack 6) imports, opset 20.

It has no TensorScatter, so that the graph gives the new keys and values only, which the runtime copies into its buffers
behind the step: `new.{layer}.key` and `.value` [1, KV, S, D]. Attention reads buffers and new keys where they are, each
as a part of its own.
"""

from contextlib import AbstractContextManager
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from fusionroute.fr_export.graphs.dialects import layers, rotary, tensorrt
from fusionroute.fr_export.graphs.dialects.primitive import attend
from fusionroute.fr_export.graphs.graph import Graph

OPSET = 20
NEW = "new."


class Step(tensorrt.Step):
    """`present` is what is new."""

    def parts(self, layer: int, key: Tensor, value: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The used part of the layer's buffers [1, KV, T, D] and the new keys, and the values alike; the new ones
        become outputs.
        """
        self.present[layer] = (key, value)
        used = self.keys.shape[0]
        torch._check(used <= self.past[layer][0].shape[2])
        past_key, past_value = (past[:, :, :used] for past in self.past[layer])
        return [past_key, key], [past_value, value]

    def attended(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None, window: int | None
    ) -> Tensor:
        """As in `tensorrt`."""
        keys, values = self.parts(layer, key, value)
        return attend(query, keys, values, self.mask(window), scaling, softcap)

    def mask(self, window: int | None) -> Tensor:
        """Which keys a query sees, bool [S, T + S]: of the buffers those that were written, and of all those as in
        `tensorrt`.
        """
        if window not in self.masks:
            distance = self.positions[:, None] - torch.cat([self.keys, self.positions])[None]
            written = torch.cat([self.keys < self.write_index, self.positions >= self.write_index])
            near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            self.masks[window] = near & written[None]
        return self.masks[window]


NORM = layers.normalised("::SimplifiedLayerNormalization", 1)  # spelled out later, see `passes.decompose_rmsnorm`


def emitting(model: Any) -> AbstractContextManager[None]:
    """Make the model's linear, norm and attention calls emit this dialect's operators."""
    return layers.emitting(model, tensorrt.ATTENTION, NORM, rotary.by_tables)


class Forward(tensorrt.Forward):
    """The signature of `tensorrt`, with new keys and values in place of whole buffers."""

    Step = Step


example, end_with = tensorrt.example, tensorrt.end_with


def names(count: int) -> tuple[list[str], list[str]]:
    """Names of the graph's inputs and outputs, in order, for so many layers."""
    inputs, outputs = tensorrt.names(count)
    return inputs, [name.replace("present.", NEW) for name in outputs]


def finish(graph: Graph, max_seq_len: int) -> None:
    """As for `tensorrt`."""
    tensorrt.finish(graph, max_seq_len)
    for value in graph.model.graph.outputs:
        if str(value.name).startswith(NEW):
            value.shape = ir.Shape([1, graph.cache[0], "sequence", graph.cache[1]])
