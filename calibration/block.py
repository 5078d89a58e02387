"""A part of a model that runs by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Block:
    """A part of a model that runs by itself: a decoder block, a piece of one, or the final norm (`head`, without the
    product of the LM head).

    graph: serialised ONNX without weights; every weight is a graph input. Equal blocks have equal bytes.
    states_in: the graph inputs that take the previous block's `states_out`, in order. The first block takes embedding
    rows, float32 [1, S, H]. A state that is in both passes through and is no output of the graph.
    observed: weight matrix of the model's graph → the state or the output of this graph that is the matrix's input
    [1, S, K].
    channels: weight matrix → K.
    weights: graph input → the name of a weight in the model's graph.
    products: graph input → the matrix whose product with what is `observed` of it this input takes. Such products are
    not in the graph: they are done for many texts at once.
    caches: cache of the model's graph, such as `present.0.key` → the output of this graph that it is
    [1, KV, S, D]. cache_channels: KV·D.

    Other graph inputs have the names of the `ort` dialect. The cache is `past.key` and `past.value`
    [1, KV, capacity, D].
    """

    name: str
    graph: bytes
    states_in: tuple[str, ...]
    states_out: tuple[str, ...]
    observed: Mapping[str, str]
    channels: Mapping[str, int]
    weights: Mapping[str, str]
    products: Mapping[str, str] = field(default_factory=dict)
    caches: Mapping[str, str] = field(default_factory=dict)
    cache_channels: int = 0

    @property
    def reads(self) -> list[str]:
        """The weights of the model's graph that running it takes."""
        return [*self.weights.values(), *self.products.values()]
