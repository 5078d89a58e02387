"""The `tensorrt` dialects for router and expert in one pass: two texts through one model, side by side in one sequence.

Whatever a graph of one model takes and gives, a pair's takes and gives twice, the expert's under `expert.…`. Norms and
products read the tokens of both; each text attends to its own caches. No input says how long the texts are: their
shapes do, so that TensorRT needs nothing from the host to run. `passes.expert_factors` ends such a graph.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from fusionroute.fr_export.checkpoints.system import RoutingHead
from fusionroute.fr_export.graphs.dialects import layers, tensorrt, tensorrt_10_3
from fusionroute.fr_export.graphs.dialects.dialect import Dialect
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.runtime.limits import EXPERT


class PairStep:
    """The steps of two texts as one: the first `count` tokens are the router's, the others the expert's."""

    def __init__(self, router: tensorrt.Step, expert: tensorrt.Step, count: int):
        self.router, self.expert, self.count = router, expert, count

    def attended(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None, window: int | None
    ) -> Tensor:
        """As `tensorrt.Step.attended`, of each text."""
        ends = {self.router: slice(self.count), self.expert: slice(self.count, None)}
        texts = [
            step.attended(layer, query[:, :, own], key[:, :, own], value[:, :, own], scaling, softcap, window) for step, own in ends.items()
        ]
        return torch.cat(texts, 2)


class PairForward(layers.Model):
    """The arguments of `tensorrt.Forward`, of the router and then of the expert."""

    def __init__(self, model: Any, max_seq_len: int, step: type[tensorrt.Step]):
        super().__init__(model, max_seq_len)
        self.Step = step

    def forward(
        self, input_ids: Tensor, write_index: Tensor, key_positions: Tensor, logit_positions: Tensor, past: list[tuple[Tensor, Tensor]],
        expert_ids: Tensor, expert_index: Tensor, expert_keys: Tensor, expert_logits: Tensor, expert_past: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:  # fmt: skip
        """Returns logits [1, K, V] and hidden [1, K, H] of the positions of both, and what is new of each cache."""
        count = input_ids.shape[1]
        places = write_index + torch.arange(count), expert_index + torch.arange(expert_ids.shape[1])
        router = self.Step(past, write_index, places[0], key_positions)
        expert = self.Step(expert_past, expert_index, places[1], expert_keys)
        answered = torch.cat([logit_positions, expert_logits + count])
        ids, positions = torch.cat([input_ids, expert_ids], 1), torch.cat(places)[None]
        logits, hidden = self.answer(ids, positions, answered, PairStep(router, expert, count))
        return logits, hidden, router.present, expert.present


@dataclass(frozen=True)
class Pair:
    """A dialect for pairs, made of one for single models."""

    single: Any  # a module such as `tensorrt`

    @property
    def OPSET(self) -> int:
        """That of the dialect for single models."""
        return int(self.single.OPSET)

    def Forward(self, model: Any, max_seq_len: int) -> nn.Module:
        """See `Dialect`: (logits, hidden, present, the expert's present)."""
        return PairForward(model, max_seq_len, self.single.Forward.Step)

    def example(self, config: Any, max_seq_len: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """See `Dialect`. No tensor stands for two arguments, nor a length for two: tracing would take them for one."""
        (ids, index, keys, answered, past), dynamic = self.single.example(config, max_seq_len)
        return (
            ids,
            index,
            keys,
            answered,
            past,
            ids[:, 1:],
            index - 1,
            keys[:-1],
            answered - 1,
            layers.caches(config, max_seq_len),
        ), 2 * dynamic

    def names(self, count: int) -> tuple[list[str], list[str]]:
        """See `Dialect`."""
        inputs, (logits, hidden, *caches) = self.single.names(count)
        return [*inputs, *(EXPERT + name for name in inputs)], [logits, hidden, *caches, *(EXPERT + name for name in caches)]

    def emitting(self, model: Any) -> AbstractContextManager[None]:
        """See `Dialect`."""
        emitting: AbstractContextManager[None] = self.single.emitting(model)
        return emitting

    def finish(self, graph: Graph, max_seq_len: int) -> None:
        """See `Dialect`. The dimensions of the expert's text have names of their own."""
        self.single.finish(graph, max_seq_len)
        values = {str(value.name): value for value in (*graph.model.graph.inputs, *graph.model.graph.outputs)}
        for name, value in values.items():
            if name.startswith(EXPERT):
                sizes = values[name.removeprefix(EXPERT)].shape
                assert sizes is not None
                value.shape = ir.Shape([size if isinstance(size, int) else f"expert_{size}" for size in sizes])

    def end_with(self, graph: Graph, head: RoutingHead | None) -> None:
        """See `Dialect`."""
        self.single.end_with(graph, head)


PAIR: Dialect = Pair(tensorrt)
PAIR_10_3: Dialect = Pair(tensorrt_10_3)
