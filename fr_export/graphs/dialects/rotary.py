"""Rotary embeddings as dialects need them: what a model computes for a position is looked up in tables, or computed
where it is applied.

A layer's rotary is the one that the model itself hands to `apply_rotary_pos_emb` there: it may differ by kind of layer,
turn a part of each head only, or not be called at all.
"""

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

Tables = tuple[Tensor, Tensor]  # cosines and sines, of which R values of each head are turned
# (queries [B, H, S, D], keys [B, KV, S, D], the layer's tables, positions [B, S]) → queries and keys, turned
Rotate = Callable[[Tensor, Tensor, Any, Tensor], tuple[Tensor, Tensor]]


def embeddings(model: Any) -> dict[str, nn.Module]:
    """The rotary modules of a causal LM by name: one, or one for each kind of layer."""
    return {name: module for name, module in model.model.named_children() if type(module).__name__.endswith("RotaryEmbedding")}


def required(rotary: nn.Module) -> list[str]:
    """What a rotary module must be told beside activations and positions."""
    _, _, *more = inspect.signature(rotary.forward).parameters.values()
    return [parameter.name for parameter in more if parameter.default is parameter.empty]


def computed(rotary: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """(activations, positions [B, S], kind of layer if it has several) → cosines and sines [B, S, R], without the
    updates of frequencies for long texts that transformers wraps around it.
    """
    return MethodType(inspect.unwrap(type(rotary).forward), rotary)


class Tabulated(nn.Module):
    """Stands in a model where its rotary module stood. Buffers `cos` and `sin` float32 [positions, R / 2] for each kind
    of layer; scalings of attention are in their values.
    """

    def __init__(self, rotary: nn.Module, layer_types: list[str], positions: int):
        super().__init__()
        for kind in sorted(set(layer_types)) if required(rotary) else [None]:
            cos, sin = computed(rotary)(torch.zeros(1), torch.arange(positions)[None], *([kind] if kind else []))
            for name, values in (("cos", cos), ("sin", sin)):
                self.register_buffer(labelled(name, kind), values[0, :, : values.shape[-1] // 2].contiguous())

    def forward(self, _: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tables, Tensor]:
        """What the model passes on to `apply_rotary_pos_emb` as cosines and sines: the tables, and positions [B, S]."""
        return (getattr(self, labelled("cos", layer_type)), getattr(self, labelled("sin", layer_type))), position_ids


def labelled(name: str, kind: str | None) -> str:
    """The name of a buffer for a kind of layer."""
    return f"{name}_{kind}" if kind else name


def tabulate(model: Any, positions: int) -> None:
    """Put tables in place of a model's rotary modules."""
    for name, rotary in embeddings(model).items():
        setattr(model.model, name, Tabulated(rotary, getattr(model.config, "layer_types", None) or [], positions))


def rows(tables: Tables, positions: Tensor) -> Tables:
    """Cosines and sines [B, 1, S, R / 2] at positions [B, S]."""
    cos, sin = (nn.functional.embedding(positions[:, None], table) for table in tables)
    return cos, sin


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first R values of heads [B, H, S, D] turned by cosines and sines [B, 1, S, R / 2]."""
    half = cos.shape[-1]
    one, other = x[..., :half], x[..., half : 2 * half]
    still = [x[..., 2 * half :]] if 2 * half < x.shape[-1] else []
    return torch.cat([one * cos - other * sin, other * cos + one * sin, *still], -1)


def by_tables(query: Tensor, key: Tensor, tables: Tables, positions: Tensor) -> tuple[Tensor, Tensor]:
    """A dialect's `rotate` in primitive operators."""
    cos, sin = rows(tables, positions)
    return turned(query, cos, sin), turned(key, cos, sin)


class Deferred(nn.Module):
    """Stands in a model where its rotary module stood, which then computes where it is applied.

    A model may compute its kinds of rotary in an order that changes from run to run; layers have one order.
    """

    def __init__(self, rotary: nn.Module):
        super().__init__()
        self.rotary = rotary

    def forward(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Callable[[Tensor], tuple[Tensor, Tensor]], Tensor]:
        """What the model passes on as cosines and sines: their computation, and positions [B, S]."""
        kind = [layer_type] if layer_type else []
        return lambda positions: computed(self.rotary)(x, positions, *kind), position_ids


def defer(model: Any) -> None:
    """Let a model's rotary modules compute where they are applied."""
    for name, rotary in embeddings(model).items():
        setattr(model.model, name, Deferred(rotary))
