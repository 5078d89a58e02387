"""ONNX Runtime's CPU provider: IO binding on numpy buffers, caches updated in place, no allocation per token."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusionroute.runtime.backend import REUSED, Fused, FusionInputs, Output
from fusionroute.runtime.backends import ort
from fusionroute.runtime.backends.greedy_fusion import GreedyFuser
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.cancellation import Interrupted
from fusionroute.runtime.errors import BundleError, FusionError, one_line
from fusionroute.runtime.machine import cores

if TYPE_CHECKING:
    from fusionroute.runtime.manifest import Model, Variant

TARGET = "ort:cpu"


class OrtCpu:
    """All models of one variant, each in its own inference session.

    `share_weights`: processes share packed weights, see `prepacked_weights`.
    """

    prefill_chunk = 256  # activations of 512 tokens spill out of the L2 cache between operators: about 10 % slower
    async_dispatch = False

    def __init__(self, bundle: Bundle, variant: Variant, threads: int | None = None, *, share_weights: bool = False):
        onnxruntime = ort.package("cpu")
        manifest = bundle.manifest

        def opened(graph: Path, threads: int | None, entries: dict[str, str], out: Path | None = None) -> Any:
            options = ort.settings(onnxruntime, threads or cores())
            for name, value in entries.items():
                options.add_session_config_entry(name, value)
            if out is not None:
                options.optimized_model_filepath = str(out)
            return ort.open_session(onnxruntime, graph, options, providers=["CPUExecutionProvider"])

        def session(name: str, graph: str, threads: int | None, share: bool = False) -> Any:
            path = bundle.folder / graph
            try:
                if share:
                    release: str = onnxruntime.__version__
                    from fusionroute.runtime.backends.prepacked_weights import packed  # here: most never share weights

                    path = packed(bundle, variant, name, release, lambda entries, out: opened(bundle.folder / graph, 1, entries, out))
                return opened(path, threads, {})
            except FusionError:
                raise
            except Exception as error:  # ONNX Runtime has no public base class for its errors
                raise BundleError(
                    f"ONNX Runtime {onnxruntime.__version__} cannot load {name} from {path} ({one_line(error)}); export the bundle again."
                ) from error

        with ThreadPoolExecutor(cores()) as pool:  # loading mostly packs weights, on one core per model
            sessions = list(
                pool.map(lambda model: session(model.name, variant.graphs[model.name], threads, share_weights), manifest.models)
            )
        paths = [bundle.folder / variant.graphs[model.name] for model in manifest.models]
        ort.check(sessions, manifest.models, paths, manifest.vocab_size)
        models = [
            OrtModel(session, onnxruntime.RunOptions, model, manifest.max_seq_len, manifest.vocab_size, len(manifest.experts))
            for session, model in zip(sessions, manifest.models, strict=True)
        ]
        self.router, self.experts = models[0], models[1:]
        # one pass over a row is too short for threads
        self._fusion = session("the fusion graph", variant.fusion_graph, 1)
        self._vocab = manifest.vocab_size

    def fuser(self) -> OrtFuser:
        """A fuser with buffers of its own."""
        return OrtFuser(self._fusion, self._vocab)


class OrtModel:
    """One language model's inference session."""

    def __init__(self, session: Any, run_options: Any, model: Model, capacity: int, vocab: int, experts: int):
        self.session = session
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
    """KV buffers [1, kv_heads, capacity, head_size] per layer, bound once as both past and present."""

    def __init__(self, model: OrtModel):
        self.length = 0
        self._model = model
        self._run = model.session.run_with_iobinding
        self._options = model.run_options()
        # 1.32 reads it at every run; without it that costs an exception, 40 µs
        self._options.add_run_config_entry("gpu_graph_id", "0")
        self._binding = binding = model.session.io_binding()
        spec = model.model
        shape = (1, spec.kv_heads, model.capacity, spec.head_size)
        self._buffers = zeros((2 * spec.layers, *shape))
        for layer in range(spec.layers):
            for number, kind in enumerate(("key", "value")):
                buffer = self._buffers[2 * layer + number]
                binding.bind_input(f"past.{layer}.{kind}", "cpu", 0, np.float32, shape, buffer.ctypes.data)
                binding.bind_output(f"present.{layer}.{kind}", "cpu", 0, np.float32, shape, buffer.ctypes.data)
        self._ids = np.zeros((1, model.capacity), np.int64)
        self._seqlens, self._total = np.zeros(1, np.int32), np.zeros((), np.int32)
        binding.bind_input("seqlens_k", "cpu", 0, np.int32, (1,), self._seqlens.ctypes.data)
        binding.bind_input("total_sequence_length", "cpu", 0, np.int32, (), self._total.ctypes.data)
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
        self._ids[0, :count] = ids
        self._positions[:] = positions
        self._seqlens[0] = self.length + count - 1
        self._total[()] = self.length + count
        self._options.terminate = False
        try:
            self._run(self._binding, self._options)
        except Exception as error:
            if self._options.terminate:
                raise Interrupted from error
            raise FusionError(f"ONNX Runtime failed on {count} tokens of {self._model.model.name}: {one_line(error)}") from error
        self.length += count
        output = Output(self._logits, self._routing)
        if row_count > REUSED:  # those arrays now belong to the caller
            self._bound = (0, 0)
            self._logits, self._routing = self._rows(1)
        return output

    def copy_prefix(self, other: OrtCache, length: int) -> None:
        """See `runtime.backend.Cache.copy_prefix`."""
        self._buffers[..., :length, :] = other._buffers[..., :length, :]
        self.length = length

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


def zeros(shape: tuple[int, ...]) -> np.ndarray:
    """Float32 zeros, mapped page by page as they are written.

    NumPy asks for huge pages: a few tokens of each head would take many of them.
    """
    if not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return np.zeros(shape, np.float32)
    region = mmap.mmap(-1, 4 * math.prod(shape), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        region.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(region, np.float32).reshape(shape)


class OrtFuser:
    """The fusion graph with bound buffers, bound again when shapes change.

    One candidate without a penalty goes to GreedyFuser instead.
    """

    def __init__(self, session: Any, vocab: int):
        self._run = session.run_with_iobinding
        self._binding = session.io_binding()
        self._vocab = vocab
        self._shape = (0, 0)
        self._arrays: dict[str, np.ndarray] = {
            "coefficients": np.zeros(2, np.float32),
            "penalty": np.ones((), np.float32),
            "temperature": np.ones((), np.float32),
            "k": np.zeros(1, np.int64),
        }
        for name, array in self._arrays.items():
            self._bind(name, array)
        self._penalty_ids = np.zeros((0, 0), np.int64)
        self._addresses: dict[str, int] = {}
        self._single = GreedyFuser(vocab)

    def _bind(self, name: str, array: np.ndarray) -> None:
        self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def __call__(self, inputs: FusionInputs) -> Fused:
        """See `runtime.backend.Fuser`. `router` and `expert` are float32 [K, V]."""
        router, expert, coefficients, k, penalty_ids, penalty, temperature = inputs
        count = len(router)
        if k == count == 1 and not len(penalty_ids):
            return self._single(router, expert, coefficients, temperature)
        arrays = self._arrays
        arrays["coefficients"][:] = coefficients
        arrays["penalty"][()], arrays["temperature"][()], arrays["k"][0] = penalty, temperature, k
        self._rows = (router, expert)  # bound by address: keep them alive until the run is over
        for name, array in (("router_logits", router), ("expert_logits", expert)):
            address = array.ctypes.data
            if self._addresses.get(name) != address or self._shape[0] != count:
                self._bind(name, array)
                self._addresses[name] = address
        if len(penalty_ids) or self._penalty_ids.shape != (count, 0):
            self._penalty_ids = np.ascontiguousarray(np.broadcast_to(penalty_ids, (count, len(penalty_ids))))
            self._bind("penalty_ids", self._penalty_ids)
        if self._shape != (count, k):
            self._allocate(count, k)
        try:
            self._run(self._binding)
        except Exception as error:
            raise FusionError(f"ONNX Runtime failed on the fusion graph: {one_line(error)}") from error
        return self._fused

    def row(self, fused: Fused) -> np.ndarray:
        """See `runtime.backend.Fuser.row`. Not copied: the next fusion writes into new buffers."""
        self._shape = (0, 0)
        self._single.hand_over()
        row: np.ndarray = fused.rows[0]
        return row

    def _allocate(self, count: int, k: int) -> None:
        self._fused = Fused(
            ids=np.empty((count, k), np.int64),
            logits=np.empty((count, k), np.float32),
            unpenalised=np.empty((count, k), np.float32),
            log_normaliser=np.empty(count, np.float32),
            sampling_normaliser=np.empty(count, np.float32),
            rows=np.empty((count, self._vocab), np.float32),
        )
        names = ("candidate_ids", "candidate_logits", "unpenalised", "log_normaliser", "sampling_normaliser", "fused")
        for name, array in zip(names, self._fused, strict=True):
            self._binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self._shape = (count, k)
