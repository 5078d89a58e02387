"""What passes over several segments read and answer, bound once but for what changes its shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fusionroute.runtime.backend import REUSED, Output, Segment
from fusionroute.runtime.backends.hidden_rows import HiddenRows
from fusionroute.runtime.backends.pair_graph import PairGraph


class BoundRows:
    """Token ids, the positions that are answered, and the answers there.

    With at most REUSED rows of each segment the next pass overwrites the answers.
    """

    def __init__(self, graph: PairGraph, binding: Any, capacity: int):
        """capacity: the most tokens of a pass."""
        self._graph, self._binding = graph, binding
        self._ids = np.zeros((1, capacity), np.int64)
        self._bound = (0, 0)  # tokens and rows that are bound now
        self._reused = self._new_rows(2)  # grows to the most rows asked for
        self._positions = np.zeros(2, np.int64)
        self._rows = self._reused

    def _new_rows(self, row_count: int) -> tuple[np.ndarray, np.ndarray]:
        graph = self._graph
        return np.empty((row_count, graph.result[1]), np.float32), np.empty((row_count, graph.head_rows), np.float32)

    def put(self, segments: Sequence[Segment], counts: Sequence[int], padding: int = 0) -> None:
        """Make ready for a pass over segments that take so many tokens each, dummies included, with padding behind them.

        The tokens of dummies and padding are whatever is there. Rows are even: the routing head takes them by twos too.
        """
        read, row_count = sum(counts) + padding, sum(len(segment.positions) for segment in segments)
        padded, fresh = row_count + row_count % 2, any(len(segment.positions) > REUSED for segment in segments)
        if self._bound != (read, padded):
            self._bind(read, padded, fresh)
        ids, positions, start, row = self._ids[0], self._positions, 0, 0
        for segment, count in zip(segments, counts, strict=True):
            end = row + len(segment.positions)
            ids[start : start + len(segment.ids)] = segment.ids
            positions[row:end] = segment.positions
            positions[row:end] += start
            start, row = start + count, end
        positions[row_count:] = positions[row_count - 1]
        if fresh:
            self._bound = (0, 0)  # those rows will belong to the caller

    def answers(self, segments: Sequence[Segment]) -> list[Output]:
        """What the pass answered to each segment. Routing scores are the first one's."""
        (answers, routing), rows = self._rows, self._graph.rows
        if self._bound == (0, 0):
            self._rows = self._reused
        outputs, row = [], 0
        for place, segment in enumerate(segments):
            end = row + len(segment.positions)
            scores = None if place else routing[:end] if rows is None else routing[:end, rows]
            outputs.append(Output(self._logits(answers[row:end]), scores))
            row = end
        return outputs

    def _logits(self, answers: np.ndarray) -> Any:
        """What stands for the logits of some rows."""
        return answers if self._graph.head is None else HiddenRows(answers, self._graph.head)

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
