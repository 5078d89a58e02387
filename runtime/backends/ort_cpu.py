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
from fusionroute.runtime.backends.host_memory import HostMemory
from fusionroute.runtime.backends.keys_values import KeysValues, Storage, storage_of
from fusionroute.runtime.backends.residency import Lease, OpenedModel, Residency, always
from fusionroute.runtime.backends.signature import lengths_of
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.cancellation import Interrupted
from fusionroute.runtime.errors import FusionError, one_line
from fusionroute.runtime.expert_memory import check_budget
from fusionroute.runtime.machine import cores
from fusionroute.runtime.process_memory import taken

if TYPE_CHECKING:
    from fusionroute.runtime.manifest import Model, Variant
    from fusionroute.runtime.window import Window

TARGET = "ort:cpu"
MEASURABLE = 32 << 20  # bytes of weights


class OrtCpu:
    """All models of one variant, each in its own inference session.

    `share_weights`: processes share packed weights, see `prepacked_weights`. `expert_memory`: bytes for experts, which
    are then opened as they are chosen; None: all are opened now.
    """

    prefill_chunk = 256  # activations of 512 tokens spill out of the L2 cache between operators: about 10 % slower
    on_host = True
    async_dispatch = False
    guess_limit = 0
    apart: frozenset[int] = frozenset()
    forward_both = None
    forward_together = None

    def __init__(
        self,
        bundle: Bundle,
        variant: Variant,
        threads: int | None = None,
        *,
        share_weights: bool = False,
        expert_memory: int | None = None,
    ):
        manifest = bundle.manifest
        storage = storage_of(variant)
        sessions = CpuSessions(bundle, variant, threads)

        def open_model(number: int) -> OpenedModel:
            spec = manifest.models[number]
            session = sessions.model(spec.name, variant.graphs[spec.name], share_weights)
            ort.check_model(
                session, bundle, number, variant.graphs[spec.name], lengths_of(variant.windows.get(spec.name)), storage.declared
            )
            return OpenedModel(session)

        self.expect: Callable[[int], None] | None = None
        if expert_memory is None:
            with ThreadPoolExecutor(cores()) as pool:  # opening mostly packs weights, on one core per model
                leases = [always(model) for model in pool.map(open_model, range(len(manifest.models)))]
        else:
            router, *stored = (bundle.stored_bytes(variant.graphs[model.name]) for model in manifest.models)
            check_budget(expert_memory, max(stored))  # before any model is opened
            sessions.fusion()  # what ONNX Runtime takes for itself is then not measured
            opened, growth = growing(lambda: open_model(0), router)
            residency = Residency(expert_memory, [int(growth * size) for size in stored], lambda expert: open_model(expert + 1))
            leases, self.expect = [always(opened), *residency.leases], residency.expect
        self.router, *self.experts = (
            OrtModel(
                lease,
                sessions.run_options,
                model,
                manifest.max_seq_len,
                manifest.vocab_size,
                0 if number else len(manifest.experts),
                storage,
                variant.windows.get(model.name),
            )
            for number, (lease, model) in enumerate(zip(leases, manifest.models, strict=True))
        )

        self._fusion = sessions.fusion()
        self._vocab = manifest.vocab_size

    @property
    def model_seconds(self) -> float:
        """See `runtime.backend.Backend.model_seconds`."""
        return self.router.seconds + sum(expert.seconds for expert in self.experts)

    def fuser(self) -> OrtFuser:
        """A fuser with buffers of its own."""
        return OrtFuser(self._fusion, self._vocab)


def growing(open_router: Callable[[], OpenedModel], stored: int) -> tuple[OpenedModel, float]:
    """The router, and how many bytes in memory a byte of stored weights takes, once kernels have packed them.

    Experts are packed by the same kernels. Below MEASURABLE bytes a session's own few megabytes would be measured: 1.
    """
    before = taken()
    opened = open_router()
    return opened, max((taken() - before) / stored, 1.0) if stored >= MEASURABLE else 1.0


class OrtModel:
    """One language model. `lease`: gives its inference session for a pass. experts: how many a router scores, else 0."""

    def __init__(
        self, lease: Lease, run_options: Callable[[], Any], model: Model, capacity: int, vocab: int, experts: int, storage: Storage,
        window: Window | None = None,
    ):  # fmt: skip
        self.lease, self.storage, self.window = lease, storage, window
        self.seconds = 0.0  # that its runs have taken
        self.model = model
        self.capacity = capacity
        self.vocab = vocab
        self.experts = experts
        self.run_options = run_options

    def cache(self) -> OrtCache:
        """Buffers of the full capacity. The operating system maps their pages when they are first written."""
        return OrtCache(self)


class Bound:
    """A cache bound to a session. shape: the (S, K) that its inputs and outputs are bound for now."""

    def __init__(self, binding: Any):
        self.binding = binding
        self.shape = (0, 0)


class OrtCache(HostMemory):
    """One model's KV cache, and what its passes read and write, bound once to each session but for what changes its shape."""

    def __init__(self, model: OrtModel):
        self.length = 0
        self._model = model
        self.options = model.run_options()
        self.memory = KeysValues(model.model, model.capacity, model.storage, model.window)
        self._ids = np.zeros((1, model.capacity), np.int64)
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
        """See `runtime.backend.Cache.forward`. Raises also what opening an evicted expert raises."""
        self.options.terminate = False
        with self._model.lease() as opened:
            return self._forward(opened, ids, positions)

    def _forward(self, opened: OpenedModel, ids: Sequence[int], positions: Sequence[int]) -> Output:
        count, row_count = len(ids), len(positions)
        bound = opened.bindings.get(self)
        if bound is None:
            bound = Bound(opened.session.io_binding())
            self.memory.bind(bound.binding)
            opened.bindings[self] = bound
        if bound.shape != (count, row_count):
            self._bind(bound, count, row_count)
        if count == 1:  # its position is the zero that was bound
            self._ids[0, 0] = ids[0]
        else:
            self._ids[0, :count] = ids
            self._positions[:] = positions
        self.memory.begin_pass(self.length, count)
        begun = perf_counter()
        try:
            opened.session.run_with_iobinding(bound.binding, self.options)
        except Exception as error:
            if self.options.terminate:
                raise Interrupted from error
            raise FusionError(f"ONNX Runtime failed on {count} tokens of {self._model.model.name}: {one_line(error)}") from error
        self._model.seconds += perf_counter() - begun
        self.length += count
        output = Output(self._logits, self._routing)
        if row_count > REUSED:  # those arrays now belong to the caller
            bound.shape = (0, 0)
            self._logits, self._routing = self._rows(1)
        return output

    def _bind(self, bound: Bound, count: int, row_count: int) -> None:
        bound.shape = (0, 0)  # until everything is bound: after an error the next call binds again
        binding, model = bound.binding, self._model
        binding.bind_input("input_ids", "cpu", 0, np.int64, (1, count), self._ids.ctypes.data)
        self._positions = np.zeros(row_count, np.int64)
        binding.bind_input("logit_positions", "cpu", 0, np.int64, (row_count,), self._positions.ctypes.data)
        self._logits, self._routing = self._rows(row_count)
        binding.bind_output("logits", "cpu", 0, np.float32, (1, row_count, model.vocab), self._logits.ctypes.data)
        if self._routing is not None:
            binding.bind_output("routing", "cpu", 0, np.float32, (1, row_count, model.experts), self._routing.ctypes.data)
        bound.shape = (count, row_count)
