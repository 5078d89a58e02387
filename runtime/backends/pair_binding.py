"""Everything that is bound by address to a graph that reads two segments of one sequence.

Neither segment may be empty: where one model reads alone, a dummy token stands for the other one. A dummy token also
makes an odd number of tokens even. Products take rows by twos, and a single row has another kernel, which rounds
differently: so an expert's answer does not depend on what the router reads beside it, or whether it does.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any

import numpy as np

from fusionroute.runtime.backend import Arrays, Output, Segment
from fusionroute.runtime.backends.bound_rows import BoundRows
from fusionroute.runtime.backends.keys_values import KeysValues
from fusionroute.runtime.backends.pair_graph import PairGraph
from fusionroute.runtime.cancellation import Interrupted
from fusionroute.runtime.errors import FusionError, one_line
from fusionroute.runtime.limits import EXPERT


class PairBinding:
    """Everything that the passes of a router and an expert read and write, bound once but for what changes its shape.

    options: of its runs. names: of the models that read, for errors.
    """

    def __init__(self, graph: PairGraph, router: KeysValues, expert: KeysValues, factors: Arrays, options: Any, names: str):
        self._graph, self._memories, self._options, self._names = graph, (router, expert), options, names
        self._binding = binding = graph.session.io_binding()
        router.bind(binding, "")
        expert.bind(binding, EXPERT)
        for name in graph.deltas:
            array = factors[name]
            binding.bind_input(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
        self._factors = factors  # bound by address: kept alive
        self._rows = BoundRows(graph, binding, router.shape[2] + expert.shape[2])
        self._counts = np.zeros(2, np.int64)
        binding.bind_input("segments", "cpu", 0, np.int64, (2,), self._counts.ctypes.data)

    def run(self, segments: tuple[Segment, Segment], lengths: tuple[int, int]) -> tuple[Output, Output]:
        """One pass of the router's segment and the expert's behind so many tokens: the outputs of both.

        With at most REUSED rows of each the next pass overwrites them. Raises Interrupted, once `terminate` is set in the
        options, and FusionError.
        """
        own, other = segments
        counts = self._even_counts(len(own.ids), len(other.ids), lengths)
        self._rows.put(segments, counts)
        self._counts[:] = counts
        for memory, length, count in zip(self._memories, lengths, counts, strict=True):
            memory.begin_pass(length, count)
        run(self._graph, self._binding, self._options, sum(counts), self._names)
        routed, answered = self._rows.answers(segments)
        return routed, answered

    def _even_counts(self, own: int, other: int, lengths: tuple[int, int]) -> list[int]:
        """How many tokens of each a pass reads: one more where their sum is odd, if its buffers have room.

        The longer segment takes it: attention and the factors' products have other kernels for a single token.
        """
        counts = [own, other]
        if (own + other) % 2:
            longer = int(other > own)
            for place in (longer, 1 - longer):
                if lengths[place] + counts[place] < self._memories[place].shape[2]:
                    counts[place] += 1
                    break
        return counts


def run(graph: PairGraph, binding: Any, options: Any, tokens: int, names: str) -> None:
    """One pass over what is bound: so many tokens, of models with these names.

    Raises Interrupted once `terminate` is set in the options, and FusionError.
    """
    options.terminate = False
    begun = perf_counter()
    try:
        graph.session.run_with_iobinding(binding, options)
    except Exception as error:
        if options.terminate:
            raise Interrupted from error
        raise FusionError(f"ONNX Runtime failed on {tokens} tokens of {names}: {one_line(error)}") from error
    graph.seconds += perf_counter() - begun
