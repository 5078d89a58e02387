"""ONNX Runtime's CPU provider: IO binding on numpy buffers, caches updated in place, no allocation per token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from fusionroute.runtime.backend import REUSED, Output
from fusionroute.runtime.backends import ort
from fusionroute.runtime.backends.cpu_fusion import OrtFuser
from fusionroute.runtime.backends.cpu_sessions import CpuSessions
from fusionroute.runtime.backends.keys_values import KeysValues, Storage, storage_of
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.cancellation import Interrupted
from fusionroute.runtime.errors import FusionError, one_line
from fusionroute.runtime.machine import cores

if TYPE_CHECKING:
    from fusionroute.runtime.manifest import Model, Variant
    from fusionroute.runtime.window import Window

TARGET = "ort:cpu"


class OrtCpu:
    """All models of one variant, each in its own inference session.

    `share_weights`: processes share packed weights, see `prepacked_weights`.
    """

    prefill_chunk = 256  # activations of 512 tokens spill out of the L2 cache between operators: about 10 % slower
    on_host = True
    async_dispatch = False
    guess_limit = 0
    apart: frozenset[int] = frozenset()
    forward_both = None

    def __init__(self, bundle: Bundle, variant: Variant, threads: int | None = None, *, share_weights: bool = False):
        manifest = bundle.manifest
        storage = storage_of(variant)
        opened = CpuSessions(bundle, variant, threads)
        with ThreadPoolExecutor(cores()) as pool:  # loading mostly packs weights, on one core per model
            sessions = list(pool.map(lambda model: opened.model(model.name, variant.graphs[model.name], share_weights), manifest.models))
        names = [variant.graphs[model.name] for model in manifest.models]
        ort.check_models(sessions, bundle, names, caches=storage.declared, windows=variant.windows)
        models = [
            OrtModel(
                session,
                opened.run_options,
                model,
                manifest.max_seq_len,
                manifest.vocab_size,
                len(manifest.experts),
                storage,
                variant.windows.get(model.name),
            )
            for session, model in zip(sessions, manifest.models, strict=True)
        ]
        self.router, self.experts = models[0], models[1:]
        self._fusion = opened.fusion()
        self._vocab = manifest.vocab_size

    @property
    def model_seconds(self) -> float:
        """See `runtime.backend.Backend.model_seconds`."""
        return self.router.seconds + sum(expert.seconds for expert in self.experts)

    def fuser(self) -> OrtFuser:
        """A fuser with buffers of its own."""
        return OrtFuser(self._fusion, self._vocab)


class OrtModel:
    """One language model's inference session."""

    def __init__(
        self, session: Any, run_options: Callable[[], Any], model: Model, capacity: int, vocab: int, experts: int, storage: Storage,
        window: Window | None = None,
    ):  # fmt: skip
        self.session, self.storage, self.window = session, storage, window
        self.seconds = 0.0  # that its runs have taken
        self.model = model
        self.capacity = capacity
        self.vocab = vocab
        outputs = {output.name for output in session.get_outputs()}
        self.experts = experts if "routing" in outputs else 0
        self.run_options = run_options

    def cache(self) -> OrtCache:
        """Buffers of the full capacity. The operating system maps their pages when they are first written."""
        return OrtCache(self)


class OrtCache:
    """One model's KV cache, and what its passes read and write, bound once but for what changes its shape."""

    def __init__(self, model: OrtModel):
        self.length = 0
        self._model = model
        self._run = model.session.run_with_iobinding
        self._options = model.run_options()
        self._binding = binding = model.session.io_binding()
        self._memory = KeysValues(model.model, model.capacity, model.storage, model.window)
        self._memory.bind(binding)
        self._ids = np.zeros((1, model.capacity), np.int64)
        self._bound = (0, 0)  # the (S, K) that is bound now
        self._reused = self._outputs(1)  # grows to the most rows asked for, up to REUSED
        self._positions = np.zeros(1, np.int64)
        self._logits, self._routing = self._reused

    def _outputs(self, row_count: int) -> tuple[np.ndarray, np.ndarray | None]:
        logits = np.empty((row_count, self._model.vocab), np.float32)
        return logits, np.empty((row_count, self._model.experts), np.float32) if self._model.experts else None

    def _rows(self, row_count: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Output buffers: views of the ones used again, or beyond REUSED rows new arrays for the caller."""
        if row_count > REUSED:
            return self._outputs(row_count)
        if row_count > len(self._reused[0]):
            self._reused = self._outputs(row_count)
        logits, routing = self._reused
        return logits[:row_count], None if routing is None else routing[:row_count]

    def forward(self, ids: Sequence[int], positions: Sequence[int]) -> Output:
        """See `runtime.backend.Cache.forward`."""
        count, row_count = len(ids), len(positions)
        if self._bound != (count, row_count):
            self._bind(count, row_count)
        if count == 1:  # its position is the zero that was bound
            self._ids[0, 0] = ids[0]
        else:
            self._ids[0, :count] = ids
            self._positions[:] = positions
        self._memory.begin_pass(self.length, count)
        self._options.terminate = False
        begun = perf_counter()
        try:
            self._run(self._binding, self._options)
        except Exception as error:
            if self._options.terminate:
                raise Interrupted from error
            raise FusionError(f"ONNX Runtime failed on {count} tokens of {self._model.model.name}: {one_line(error)}") from error
        self._model.seconds += perf_counter() - begun
        self.length += count
        output = Output(self._logits, self._routing)
        if row_count > REUSED:  # those arrays now belong to the caller
            self._bound = (0, 0)
            self._logits, self._routing = self._rows(1)
        return output

    def copy_prefix(self, other: OrtCache, length: int) -> None:
        """See `runtime.backend.Cache.copy_prefix`."""
        self._memory.copy(other._memory, length)
        self.length = length

    def keys_values(self, length: int) -> np.ndarray:
        """See `runtime.backend.HostCache.keys_values`."""
        return self._memory.view(length)

    def interrupt(self) -> None:
        """See `runtime.backend.Cache.interrupt`. ONNX Runtime checks between two operators."""
        self._options.terminate = True

    def _bind(self, count: int, row_count: int) -> None:
        self._bound = (0, 0)  # until everything is bound: after an error the next call binds again
        binding, model = self._binding, self._model
        binding.bind_input("input_ids", "cpu", 0, np.int64, (1, count), self._ids.ctypes.data)
        self._positions = np.zeros(row_count, np.int64)
        binding.bind_input("logit_positions", "cpu", 0, np.int64, (row_count,), self._positions.ctypes.data)
        self._logits, self._routing = self._rows(row_count)
        binding.bind_output("logits", "cpu", 0, np.float32, (1, row_count, model.vocab), self._logits.ctypes.data)
        if self._routing is not None:
            binding.bind_output("routing", "cpu", 0, np.float32, (1, row_count, model.experts), self._routing.ctypes.data)
        self._bound = (count, row_count)
