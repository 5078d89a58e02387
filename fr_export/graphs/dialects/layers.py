"""What all dialects share: products with weights as the checkpoint stores them, the routing head, and the patching of a
model's modules.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.onnx.ops import symbolic

from fusionroute.fr_export.checkpoints.system import RoutingHead
from fusionroute.fr_export.graphs.dialects import rotary
from fusionroute.fr_export.graphs.graph import Graph, initializer, node

Norm = Callable[[nn.Module, Tensor], Tensor]
NORMS = ("SimplifiedLayerNormalization", "RMSNormalization")  # operators of one input and its weight


def cache_head_size(head_size: int) -> int:
    """GroupQueryAttention takes head sizes that are multiples of 8; others are padded with zeros, which change no
    product.

    Every dialect pads: a bundle's caches have one shape.
    """
    return -(-head_size // 8) * 8


def padded(*heads: Tensor) -> list[Tensor]:
    """Queries, keys or values [..., D] with D as it is in the cache."""
    size = heads[0].shape[-1]
    padded_size = cache_head_size(size)
    return [nn.functional.pad(x, (0, padded_size - size)) if padded_size != size else x for x in heads]


def linear(self: nn.Linear, x: Tensor) -> Tensor:
    """A matrix product with the weight as the checkpoint stores it, [out, in]: no transpose to fold, a tied head needs
    no copy.
    """
    y = symbolic(
        "com.microsoft::FusedMatMul",
        [x, self.weight],
        {"transB": 1},
        dtype=x.dtype,
        shape=(*x.shape[:-1], self.out_features),
        version=1,
    )
    return y if self.bias is None else y + self.bias


def normalised(operator: str, version: int) -> Norm:
    """RMSNorm as one operator of the dialect. The weight is read with the family's offset already added."""

    def norm(self: nn.Module, x: Tensor) -> Tensor:
        epsilon = float(getattr(self, "variance_epsilon", None) or self.eps)
        attributes: dict[str, Any] = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
        return symbolic(operator, [x, self.weight], attributes, dtype=x.dtype, shape=x.shape, version=version)

    return norm


@contextlib.contextmanager
def emitting(model: Any, attention: str, norm: Norm, rotate: rotary.Rotate | None) -> Iterator[None]:
    """Make the model's linear, norm, rotary and attention calls emit a dialect's operators. None: its own rotary call
    with what is computed there.
    """
    model.set_attn_implementation(attention)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = MethodType(linear, module)
        elif type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(norm, module)
    modeling: Any = sys.modules[type(model).__module__]
    original = modeling.apply_rotary_pos_emb

    def own(query: Tensor, key: Tensor, compute: Callable[[Tensor], rotary.Tables], positions: Tensor) -> tuple[Tensor, Tensor]:
        turned: tuple[Tensor, Tensor] = original(query, key, *compute(positions))
        return turned

    modeling.apply_rotary_pos_emb = rotate or own
    try:
        yield
    finally:
        modeling.apply_rotary_pos_emb = original


class Model(nn.Module):
    """A causal LM that answers with the logits and the final hidden states of some positions."""

    def __init__(self, model: Any, max_seq_len: int):
        super().__init__()
        self.model = model
        self.replace_rotary(max_seq_len)

    def replace_rotary(self, max_seq_len: int) -> None:
        """Its rotary embeddings become tables of `max_seq_len` positions."""
        rotary.tabulate(self.model, max_seq_len)

    def answer(self, input_ids: Tensor, positions: Tensor, logit_positions: Tensor | int, step: Any) -> tuple[Tensor, Tensor]:
        """input_ids and positions [B, S], logit_positions [K] (or 0: all) → logits [B, K, V], hidden [B, K, H]."""
        hidden: list[Tensor] = []
        handle = self.model.lm_head.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
        logits = self.model(input_ids=input_ids, position_ids=positions, use_cache=False, logits_to_keep=logit_positions, step=step).logits
        handle.remove()
        return logits, hidden[0]


def caches(config: Any, capacity: int) -> list[tuple[Tensor, Tensor]]:
    """Example KV buffers [1, KV, capacity, D], per layer."""
    shape = (1, config.num_key_value_heads, capacity, cache_head_size(config.head_dim))
    return [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_hidden_layers)]


def names(layers: int, own: list[str]) -> tuple[list[str], list[str]]:
    """Names of a graph's inputs, beginning with the dialect's `own`, and of its outputs, in order."""
    kinds = [f"{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
    return [*own, *(f"past.{kind}" for kind in kinds)], ["logits", "hidden", *(f"present.{kind}" for kind in kinds)]


def name_dimensions(graph: Graph, own: dict[str, list[int | str]], capacity: int | str) -> None:
    """Give the dimensions of inputs and outputs names that people can read."""
    ends = graph.model.graph
    shapes: dict[str, list[int | str]] = own | {
        value.name: [1, "positions", int(value.shape[-1])] for value in ends.outputs if value.name in ("logits", "hidden")
    }
    for value in (*ends.inputs, *ends.outputs):
        if value.name.startswith(("past.", "present.")):
            value.shape = ir.Shape([1, graph.cache[0], capacity, graph.cache[1]])
        elif value.name in shapes:
            value.shape = ir.Shape(shapes[value.name])


def end_with(graph: Graph, head: RoutingHead | None, product: str, turned: bool, **attributes: int) -> None:
    """Turn the hidden output into the router's `routing` [1, K, n] (always fp32), or drop it for an expert.

    `product` is the operator that multiplies with the head's weight, [hidden, n] where it is `turned`.
    """
    inner = graph.model.graph
    hidden = inner.outputs.pop(1)
    if head is None:
        return
    n = len(head.bias)
    matrix = np.ascontiguousarray(head.weight.T) if turned else head.weight
    weight, bias = (
        initializer(inner, f"routing_head.{kind}", ir.DataType.FLOAT, array.shape, ir.tensor(array, name=f"routing_head.{kind}"))
        for kind, array in (("weight", matrix), ("bias", head.bias))
    )
    scores, routing = (
        ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, "positions", n])) for name in ("scores", "routing")
    )
    node(inner, None, product, [hidden, weight], [scores], **attributes)
    node(inner, None, "Add", [scores, bias], [routing])
    inner.outputs.insert(1, routing)
