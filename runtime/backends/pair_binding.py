"""A graph that reads two segments of one sequence, and everything that is bound to it by address.

Neither segment may be empty: where one model reads alone, a dummy token stands for the other one. A dummy token also
makes an odd number of tokens even. Products take rows by twos, and a single row has another kernel, which rounds
differently: so an expert's answer does not depend on what the router reads beside it, or whether it does.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from fusionroute.runtime.backend import REUSED, Arrays, Output, Segment
from fusionroute.runtime.backends import ort
from fusionroute.runtime.backends.hidden_rows import Head, HiddenRows
from fusionroute.runtime.backends.keys_values import KeysValues
from fusionroute.runtime.backends.signature import FLOAT, ORT_LENGTHS, CacheValue, Value, of_model, of_pair
from fusionroute.runtime.cancellation import Interrupted
from fusionroute.runtime.errors import FusionError, one_line
from fusionroute.runtime.limits import DELTA, EXPERT

if TYPE_CHECKING:
    from fusionroute.runtime.bundle import Bundle
    from fusionroute.runtime.manifest import Model


class PairGraph:
    """The inference session and its sizes. rows: those of the routing head that have an expert; None: all of them."""

    def __init__(
        self, session: Any, run_options: Callable[[], Any], spec: Model, capacity: int, result: tuple[str, int], head: Head | None,
        head_rows: int,
    ):  # fmt: skip
        """result: the name and width of the output that a model answers with. head: what makes logits of it, None where
        it is logits.
        """
        self.session, self.run_options, self.spec = session, run_options, spec
        self.capacity, self.result, self.head, self.head_rows = capacity, result, head, head_rows
        self.rows: list[int] | None = None
        self.seconds = 0.0  # that its runs have taken
        values = (*session.get_inputs(), *session.get_outputs())
        self._shapes: dict[str, tuple[int | str, ...]] = {value.name: tuple(value.shape) for value in values}
        self.deltas = {name: shape for name, shape in self._shapes.items() if name.startswith(DELTA)}

    def check(self, bundle: Bundle, name: str, caches: CacheValue, factor_types: tuple[str, ...] = FLOAT) -> None:
        """Raise BundleError unless its inputs and outputs are those of the manifest. caches: what keys and values are stored as."""
        own = of_model(self.spec, self.capacity, self.result, self.head_rows, ORT_LENGTHS, caches)
        factors = {delta: Value(factor_types, (None,) * len(shape)) for delta, shape in self.deltas.items()}
        ort.check(self.session, of_pair(own, EXPERT, factors), bundle, name, self.capacity)

    def unfit(self, factors: Arrays) -> str | None:
        """The first input that an expert's factors do not fit; None: they fit. Names in a shape stand for any rank."""
        for name, shape in self.deltas.items():
            given = factors[name].shape if name in factors else ()
            if len(given) != len(shape) or any(isinstance(size, int) and size != other for size, other in zip(shape, given, strict=True)):
                return name
        return None


class PairBinding:
    """Everything that the passes of a router and an expert read and write, bound once but for what changes its shape.

    options: of its runs. names: of the models that read, for errors.
    """

    def __init__(self, graph: PairGraph, router: KeysValues, expert: KeysValues, factors: Arrays, options: Any, names: str):
        self._graph, self._memories, self._options, self._names = graph, (router, expert), options, names
        self._run = graph.session.run_with_iobinding
        self._binding = binding = graph.session.io_binding()
        router.bind(binding, "")
        expert.bind(binding, EXPERT)
        for name in graph.deltas:
            array = factors[name]
            binding.bind_input(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
        self._factors = factors  # bound by address: kept alive
        capacity = router.shape[2] + expert.shape[2]
        self._ids, self._counts = np.zeros((1, capacity), np.int64), np.zeros(2, np.int64)
        binding.bind_input("segments", "cpu", 0, np.int64, (2,), self._counts.ctypes.data)
        self._bound = (0, 0)  # tokens and rows that are bound now
        self._reused = self._new_rows(2)  # grows to the most rows asked for, up to 2 · REUSED
        self._positions = np.zeros(2, np.int64)
        self._rows = self._reused

    def _new_rows(self, row_count: int) -> tuple[np.ndarray, np.ndarray]:
        graph = self._graph
        return np.empty((row_count, graph.result[1]), np.float32), np.empty((row_count, graph.head_rows), np.float32)

    def run(self, segments: tuple[Segment, Segment], lengths: tuple[int, int]) -> tuple[Output, Output]:
        """One pass of the router's segment and the expert's behind so many tokens: the outputs of both.

        With at most REUSED rows of each the next pass overwrites them. Raises Interrupted, once `terminate` is set in the
        options, and FusionError.
        """
        own, other = segments
        first, row_count = len(own.positions), len(own.positions) + len(other.positions)
        counts = self._even_counts(len(own.ids), len(other.ids), lengths)
        read, padded = sum(counts), row_count + row_count % 2  # the routing head takes rows by twos too
        fresh = max(first, row_count - first) > REUSED
        if self._bound != (read, padded):
            self._bind(read, padded, fresh)
        self._counts[:] = counts
        ids, positions = self._ids[0], self._positions
        ids[: len(own.ids)], ids[counts[0] : counts[0] + len(other.ids)] = own.ids, other.ids  # dummies: whatever is there
        positions[:first], positions[first:row_count] = own.positions, other.positions
        positions[first:row_count] += counts[0]
        positions[row_count:] = positions[row_count - 1]
        for memory, length, count in zip(self._memories, lengths, counts, strict=True):
            memory.begin_pass(length, count)
        self._options.terminate = False
        begun = perf_counter()
        try:
            self._run(self._binding, self._options)
        except Exception as error:
            if self._options.terminate:
                raise Interrupted from error
            raise FusionError(f"ONNX Runtime failed on {read} tokens of {self._names}: {one_line(error)}") from error
        self._graph.seconds += perf_counter() - begun
        answers, routing = self._rows
        if fresh:  # those arrays now belong to the caller
            self._bound, self._rows = (0, 0), self._reused
        scores = routing[:first] if self._graph.rows is None else routing[:first, self._graph.rows]
        return Output(self._logits(answers[:first]), scores), Output(self._logits(answers[first:row_count]), None)

    def _logits(self, answers: np.ndarray) -> Any:
        """What stands for the logits of some rows."""
        return answers if self._graph.head is None else HiddenRows(answers, self._graph.head)

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

    def _bind(self, count: int, row_count: int, fresh: bool) -> None:
        """Bind what depends on how many tokens a pass reads and answers; `fresh`: new rows for the caller."""
        self._bound = (0, 0)  # until everything is bound: after an error the next call binds again
        binding = self._binding
        if not fresh and row_count > len(self._reused[0]):
            self._reused = self._new_rows(row_count)
        rows = self._new_rows(row_count) if fresh else self._reused
        self._rows = rows[0][:row_count], rows[1][:row_count]
        self._positions = np.zeros(row_count, np.int64)
        binding.bind_input("input_ids", "cpu", 0, np.int64, (1, count), self._ids.ctypes.data)
        binding.bind_input("logit_positions", "cpu", 0, np.int64, (row_count,), self._positions.ctypes.data)
        for name, array in zip((self._graph.result[0], "routing"), self._rows, strict=True):
            binding.bind_output(name, "cpu", 0, np.float32, (1, *array.shape), array.ctypes.data)
        self._bound = (count, row_count)
