"""A graph in which the router and every expert have a segment of a pass: those read whose segments have tokens.

Passes have an even number of tokens, with one of padding where needed: products take rows by twos, and a single row has
another kernel, which rounds differently. So a model's answer does not depend on who reads beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import numpy as np

from fusionroute.runtime.backend import Arrays, Output, Segment
from fusionroute.runtime.backends.bound_rows import BoundRows
from fusionroute.runtime.backends.host_memory import HostMemory
from fusionroute.runtime.backends.keys_values import KeysValues, Storage
from fusionroute.runtime.backends.pair_binding import run
from fusionroute.runtime.backends.pair_graph import PairGraph
from fusionroute.runtime.backends.signature import Signature, Values, of_experts
from fusionroute.runtime.limits import DELTA, EXPERT, numbered

if TYPE_CHECKING:
    pass


class ExpertSegments(PairGraph):
    """The inference session and its sizes. Place 0 of a pass is the router's, and place k that of the routing head's row
    k − 1. `factors`: by the rows that have an expert.
    """

    def __init__(self, *arguments: Any):
        """As `PairGraph`."""
        super().__init__(*arguments)
        self.factors: dict[int, Arrays] = {}
        first = numbered(0, DELTA)
        self.deltas = {name.removeprefix(numbered(0, "")): shape for name, shape in self._shapes.items() if name.startswith(first)}

    def signature(self, own: Signature, factors: Values) -> Signature:
        """See `PairGraph.signature`."""
        return of_experts(own, EXPERT, factors, self.head_rows)

    def with_factors(self, factors: dict[int, Arrays]) -> ExpertSegments:
        """The same graph with other experts."""
        other = copy(self)
        other.factors = factors
        return other


class SegmentModel:
    """The router, or an expert, by its place in a pass."""

    def __init__(self, graph: ExpertSegments, place: int, name: str, storage: Storage):
        self.graph, self.place, self.name, self.storage = graph, place, name, storage

    @property
    def factors(self) -> Arrays:
        """What is bound for an expert."""
        return self.graph.factors[self.place - 1]

    def cache(self) -> SegmentCache:
        """Buffers of the full capacity. The operating system maps their pages when they are first written."""
        return SegmentCache(self)


class SegmentCache(HostMemory):
    """One model's KV cache on the CPU."""

    def __init__(self, model: SegmentModel):
        self.length, self.model = 0, model
        self.memory = KeysValues(model.graph.spec, model.graph.capacity, model.storage)
        self.options = model.graph.run_options()
        self._passes: SegmentPasses | None = None

    @property
    def passes(self) -> SegmentPasses:
        """Those that begin with this model's segment, bound when the first one is read."""
        self._passes = self._passes or SegmentPasses(self.model, self.options)
        return self._passes

    def forward(self, ids: Sequence[int], positions: Sequence[int]) -> Output:
        """See `runtime.backend.Cache.forward`."""
        (output,) = read_together([(self, Segment(ids, positions))])
        return output


class SegmentPasses:
    """Everything that passes read and write which begin with one model's segment, bound once but for what changes."""

    def __init__(self, model: SegmentModel, options: Any):
        self._graph, self._options = graph, _ = model.graph, options
        self._binding = binding = graph.session.io_binding()
        places = range(graph.head_rows + 1)
        self._attached = [KeysValues(graph.spec, 1, model.storage)] * len(places)  # of those who have not read yet
        for place, memory in enumerate(self._attached):
            memory.bind(binding, prefix(place))
        self._factors = [graph.factors.get(row) or next(iter(graph.factors.values())) for row in range(graph.head_rows)]  # kept alive
        for row, factors in enumerate(self._factors):  # where a row has no expert, nobody reads them
            for name in graph.deltas:
                array = factors[name]
                binding.bind_input(numbered(row, name), "cpu", 0, np.float32, array.shape, array.ctypes.data)
        self._rows = BoundRows(graph, binding, len(places) * graph.capacity)
        self._counts = np.zeros(len(places) + 1, np.int64)
        binding.bind_input("segments", "cpu", 0, np.int64, self._counts.shape, self._counts.ctypes.data)

    def run(self, parts: Sequence[tuple[SegmentCache, Segment]]) -> list[Output]:
        """One pass over segments, in the order of their places."""
        segments, counts = [segment for _, segment in parts], [len(segment.ids) for _, segment in parts]
        padding = sum(counts) % 2
        self._counts[:] = 0
        self._counts[-1] = padding
        for (cache, _), count in zip(parts, counts, strict=True):
            place, memory = cache.model.place, cache.memory
            if self._attached[place] is not memory:
                memory.bind(self._binding, prefix(place))
                self._attached[place] = memory
            self._counts[place] = count
            memory.begin_pass(cache.length, count)
        self._rows.put(segments, counts, padding)
        *names, last = [cache.model.name for cache, _ in parts]
        who = f"{', '.join(names)} and {last}" if names else last
        run(self._graph, self._binding, self._options, sum(counts) + padding, who)
        outputs = self._rows.answers(segments)
        return [Output(each.logits, None if cache.model.place else each.routing) for each, (cache, _) in zip(outputs, parts, strict=True)]


def prefix(place: int) -> str:
    """What the names of a model's inputs begin with."""
    return numbered(place - 1, EXPERT) if place else ""


def read_together(parts: Sequence[tuple[SegmentCache, Segment]]) -> list[Output]:
    """See `runtime.backend.Backend.forward_together`."""
    outputs = parts[0][0].passes.run(parts)
    for cache, segment in parts:
        cache.length += len(segment.ids)
    return outputs
