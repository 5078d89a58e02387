"""All models of a system, each reading one token of several texts in a pass: weights are read once for all of them.

What a text begins with is read before, in one pass of its own. Models that share a base have one graph: the batch holds the
texts of the first, then those of the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fusionroute.runtime.backends import ort
from fusionroute.runtime.errors import FusionError, one_line
from fusionroute.runtime.machine import cores

Floats = npt.NDArray[np.float32]
MOST = 80  # texts: beyond, products of this many rows gain little
CACHES = 1792 << 20  # bytes of all models' caches that the number of texts is cut to


class ReadTogether(NamedTuple):
    """A graph in a file, and the numbers of the models that read in it, the router's 0. One of several has one base for them.

    batched: the graph that takes any batch, in place of the file's; None where there is none.
    """

    file: Path
    batched: bytes | None
    models: Sequence[int]


class SideBySide:
    """The models of a bundle, the router first, on the CPU. Texts have rows of their own in every cache.

    Where a graph takes no batch, there is one row, and the graphs of all files are used as they are.
    """

    def __init__(self, graphs: Sequence[ReadTogether], capacity: int, texts: int):
        """Open the graphs with caches of `capacity` tokens a text, for so many texts in all.

        Raises FusionError where ONNX Runtime cannot load one.
        """
        self._onnxruntime = ort.package("cpu")
        threads = max(1, cores() // len(graphs))
        self._pool = ThreadPoolExecutor(min(cores(), len(graphs)))
        alone = any(graph.batched is None for graph in graphs)
        sessions = list(self._pool.map(lambda graph: self._open(graph.file, None if alone else graph.batched, threads), graphs))
        self._numbers = [graph.models for graph in graphs]
        row = sum(
            4 * int(np.prod(shape))
            for session, numbers in zip(sessions, self._numbers, strict=True)
            for shape in cache_shapes(session, len(numbers), capacity).values()
        )
        most = 1 if alone else max(1, min(MOST, CACHES // row))
        self.rows = -(-texts // -(-texts // most))  # as many in the last round as in the first
        self._batches = [
            Batch(session, len(numbers), self.rows, capacity) for session, numbers in zip(sessions, self._numbers, strict=True)
        ]

    def _open(self, file: Path, graph: bytes | None, threads: int) -> Any:
        options = ort.settings(self._onnxruntime, threads)
        try:
            content = file.read_bytes() if graph is None else graph
            return ort.open_session(self._onnxruntime, content, options, str(file.parent), providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime has no public base class for its errors
            raise FusionError(f"ONNX Runtime {self._onnxruntime.__version__} cannot load {file} ({one_line(error)}).") from error

    def begin(self, row: int, ids: Sequence[int]) -> None:
        """Let every model read the first tokens of a new text, at least one, in place of what it had read in a row."""
        list(self._pool.map(lambda batch: batch.begin(row, np.array([ids], np.int64)), self._batches))

    def read(self, tokens: npt.NDArray[np.int64], lengths: npt.NDArray[np.int32]) -> list[list[Floats]]:
        """Let every model read one token [rows] of each text, behind `lengths` [rows] that it has read.

        The logits float32 [rows, V] of each model, and the routing float32 [rows, n_experts] behind the router's. They
        are valid until the next call.
        """
        answers: dict[int, list[Floats]] = {}
        read = self._pool.map(lambda batch: batch.read(tokens, lengths), self._batches)
        for numbers, rows in zip(self._numbers, read, strict=True):
            answers |= zip(numbers, rows, strict=True)
        return [answers[number] for number in range(len(answers))]

    def __enter__(self) -> SideBySide:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown()
        self._batches.clear()


class Batch:
    """The models of one graph with their caches, which are updated in place."""

    def __init__(self, session: Any, models: int, rows: int, capacity: int):
        self._session, self._models, self._rows = session, models, rows
        self._caches, self._new = (
            {name: np.zeros(shape, np.float32) for name, shape in cache_shapes(session, count, capacity).items()}
            for count in (models * rows, models)
        )
        self._given = feeds(np.zeros((models * rows, 1), np.int64), np.zeros(models * rows, np.int32))
        self._answers, self._unread = (
            {
                output.name: np.empty((count, 1, output.shape[-1]), np.float32)
                for output in session.get_outputs()
                if not output.name.startswith("present.")
            }
            for count in (models * rows, models)
        )
        self._binding = bound(session, self._given, self._caches, self._answers)

    def begin(self, row: int, ids: npt.NDArray[np.int64]) -> None:
        """See `SideBySide.begin`. ids [1, S]. A batch of several texts must begin in empty caches: hence those of their own."""
        given = feeds(np.repeat(ids, self._models, 0), np.full(self._models, ids.shape[1] - 1, np.int32))
        self._session.run_with_iobinding(bound(self._session, given, self._new, self._unread))
        for name, cache in self._caches.items():
            cache[row :: self._rows, :, : ids.shape[1]] = self._new[name][:, :, : ids.shape[1]]

    def read(self, tokens: npt.NDArray[np.int64], lengths: npt.NDArray[np.int32]) -> list[list[Floats]]:
        """See `SideBySide.read`: the answers of each of its models."""
        self._given["input_ids"][:, 0], self._given["seqlens_k"][:] = np.tile(tokens, self._models), np.tile(lengths, self._models)
        self._given["total_sequence_length"][...] = lengths.max() + 1
        self._session.run_with_iobinding(self._binding)
        parts = [np.split(answer[:, 0], self._models) for answer in self._answers.values()]
        return [list(own) for own in zip(*parts, strict=True)]


def feeds(ids: npt.NDArray[np.int64], last: npt.NDArray[np.int32]) -> dict[str, np.ndarray]:
    """What a graph takes beside its caches: ids [B, S], of which the last one stands at `last` [B] of its text. Only it
    has logits.
    """
    return {
        "input_ids": ids,
        "seqlens_k": last,
        "total_sequence_length": np.array(last.max() + 1, np.int32),
        "logit_positions": np.array([ids.shape[1] - 1], np.int64),
    }


def bound(session: Any, given: dict[str, np.ndarray], caches: dict[str, np.ndarray], answers: dict[str, np.ndarray]) -> Any:
    """A binding of a session to arrays, which the caller keeps. Caches are updated in place."""
    binding = session.io_binding()
    for name, array in (given | caches).items():
        binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    for name, array in (answers | {name.replace("past.", "present."): cache for name, cache in caches.items()}).items():
        binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    return binding


def cache_shapes(session: Any, rows: int, capacity: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's caches: [rows, kv_heads, capacity, head_size]."""
    return {
        value.name: (rows, value.shape[1], capacity, value.shape[3]) for value in session.get_inputs() if value.name.startswith("past.")
    }
