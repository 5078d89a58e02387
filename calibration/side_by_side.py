"""All models of a system, each reading one token of several texts in a pass: weights are read once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from fusionroute.runtime.backends import ort
from fusionroute.runtime.errors import FusionError, one_line
from fusionroute.runtime.machine import cores

Floats = npt.NDArray[np.float32]
MOST = 40  # texts: beyond, products of this many rows gain little
CACHES = 768 << 20  # bytes of all models' caches that the number of texts is cut to


class SideBySide:
    """The models of a bundle, the router first, on the CPU. Texts have rows of their own in every cache.

    `graphs` take any batch, or are None: then there is one row, and the graph of `files` is used as it is.
    """

    def __init__(self, files: Sequence[Path], graphs: Sequence[bytes | None], capacity: int, texts: int):
        """Open the graphs `files` (those of `graphs` in their place) with caches of `capacity` tokens a text, for so many
        texts in all.

        Raises FusionError where ONNX Runtime cannot load one.
        """
        self._onnxruntime = ort.package("cpu")
        threads = max(1, cores() // len(files))
        self._pool = ThreadPoolExecutor(min(cores(), len(files)))
        alone = any(graph is None for graph in graphs)
        self._sessions = list(self._pool.map(lambda file, graph: self._open(file, None if alone else graph, threads), files, graphs))
        row = sum(4 * int(np.prod(shape)) for session in self._sessions for shape in cache_shapes(session, 1, capacity).values())
        most = 1 if alone else max(1, min(MOST, CACHES // row))
        self.rows = -(-texts // -(-texts // most))  # as many in the last round as in the first
        self._models = [Batch(session, self.rows, capacity) for session in self._sessions]

    def _open(self, file: Path, graph: bytes | None, threads: int) -> Any:
        options = ort.settings(self._onnxruntime, threads)
        if graph is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.parent))
        try:
            return ort.open_session(self._onnxruntime, graph or file, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime has no public base class for its errors
            raise FusionError(f"ONNX Runtime {self._onnxruntime.__version__} cannot load {file} ({one_line(error)}).") from error

    def read(self, tokens: npt.NDArray[np.int64], lengths: npt.NDArray[np.int32]) -> list[list[Floats]]:
        """Let every model read one token [rows] of each text, behind `lengths` [rows] that it has read.

        The logits float32 [rows, V] of each model, and the routing float32 [rows, n_experts] behind the router's. They
        are valid until the next call.
        """
        return list(self._pool.map(lambda model: model.read(tokens, lengths), self._models))

    def __enter__(self) -> SideBySide:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown()
        self._models.clear()
        self._sessions.clear()


class Batch:
    """One model with its caches, which are updated in place."""

    def __init__(self, session: Any, rows: int, capacity: int):
        self._session, self._binding = session, session.io_binding()
        self._arrays: dict[str, np.ndarray] = {
            name: np.zeros(shape, np.float32) for name, shape in cache_shapes(session, rows, capacity).items()
        }
        for name, cache in list(self._arrays.items()):
            self._binding.bind_output(name.replace("past.", "present."), "cpu", 0, np.float32, cache.shape, cache.ctypes.data)
        self._arrays |= {
            "input_ids": np.zeros((rows, 1), np.int64),
            "seqlens_k": np.zeros(rows, np.int32),
            "total_sequence_length": np.zeros((), np.int32),
            "logit_positions": np.zeros(1, np.int64),
        }
        for name, array in self._arrays.items():
            self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self._answers = []
        for output in session.get_outputs():
            if not output.name.startswith("present."):
                self._answers.append(np.empty((rows, 1, output.shape[-1]), np.float32))
                answer = self._answers[-1]
                self._binding.bind_output(output.name, "cpu", 0, np.float32, answer.shape, answer.ctypes.data)

    def read(self, tokens: npt.NDArray[np.int64], lengths: npt.NDArray[np.int32]) -> list[Floats]:
        """See `SideBySide.read`."""
        self._arrays["input_ids"][:, 0], self._arrays["seqlens_k"][:] = tokens, lengths
        self._arrays["total_sequence_length"][...] = lengths.max() + 1
        self._session.run_with_iobinding(self._binding)
        return [answer[:, 0] for answer in self._answers]


def cache_shapes(session: Any, rows: int, capacity: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's caches: [rows, kv_heads, capacity, head_size]."""
    return {
        value.name: (rows, value.shape[1], capacity, value.shape[3]) for value in session.get_inputs() if value.name.startswith("past.")
    }
