"""ONNX Runtime on an NVIDIA GPU, with any of its providers: IO binding on buffers that stay on the device.

A run ends when the device is done. Logits stay there and go to the fusion graph. Candidates, normalisers and routing
come to the host, a full row of logits only where it is read. A decoded token allocates only views of a few arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fusionroute.runtime.backend import Output
from fusionroute.runtime.backends import ort
from fusionroute.runtime.backends.device_buffers import Inputs, Layout, Place, Rows, aligned, start
from fusionroute.runtime.backends.gpu_fusion import GpuFuser
from fusionroute.runtime.backends.providers import Opener, Provider
from fusionroute.runtime.backends.signature import HALVES, ORT_LENGTHS, TENSORRT_LENGTHS, Values, of_fusion
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.errors import FusionError, one_line
from fusionroute.runtime.limits import reach

if TYPE_CHECKING:
    from fusionroute.runtime.manifest import Model, Variant

# ONNX type of a cache → its type in numpy (ONNX's number where numpy has none), and bytes of a value
TYPES: dict[str, tuple[Any, int]] = {"tensor(float)": (np.float32, 4), "tensor(float16)": (np.float16, 2), "tensor(bfloat16)": (16, 2)}


class PositionInputs(NamedTuple):
    """How graphs of a target learn the text's length. keyed: they read as many keys as `key_positions` is long."""

    signature: Values
    lengths: Layout
    fill: Callable[[dict[str, np.ndarray], int, int], None]  # (arrays, tokens in the cache, new tokens)
    keyed: bool


def fill_ort(arrays: dict[str, np.ndarray], length: int, count: int) -> None:
    """Both inputs tell the text's length with the new tokens."""
    arrays["seqlens_k"][0] = length + count - 1
    arrays["total_sequence_length"][()] = length + count


def fill_tensorrt(arrays: dict[str, np.ndarray], length: int, count: int) -> None:
    """The position of the first new token."""
    arrays["write_index"][0] = length


POSITION_INPUTS = {
    "ort:cuda": PositionInputs(ORT_LENGTHS, {"seqlens_k": ((1,), np.int32), "total_sequence_length": ((), np.int32)}, fill_ort, False),
    "tensorrt": PositionInputs(TENSORRT_LENGTHS, {"write_index": ((1,), np.int64)}, fill_tensorrt, True),
}


class OrtGpu:
    """All models of one variant, each in its own inference session on one provider."""

    prefill_chunk = 512
    on_host = False
    model_seconds = None
    async_dispatch = False
    guess_limit = 0
    apart: frozenset[int] = frozenset()
    forward_both = None

    def __init__(self, bundle: Bundle, variant: Variant, provider: Provider):
        opener = Opener(provider)
        manifest = bundle.manifest
        names = [variant.graphs[model.name] for model in manifest.models]
        sessions = [opener.open(bundle, name) for name in names]
        position_inputs = POSITION_INPUTS[variant.target]
        ort.check_models(sessions, bundle, names, position_inputs.signature, HALVES)
        models = [
            GpuModel(session, opener.place(session), model, position_inputs, manifest.max_seq_len, manifest.vocab_size)
            for session, model in zip(sessions, manifest.models, strict=True)
        ]
        self.router, self.experts = models[0], models[1:]
        self._fusion = opener.open_fusion(bundle, variant.fusion_graph)
        ort.check(self._fusion, of_fusion(manifest.vocab_size), bundle, variant.fusion_graph)
        self._place = opener.place(self._fusion)
        self._vocab = manifest.vocab_size

    def fuser(self) -> GpuFuser:
        """A fuser with buffers of its own."""
        return GpuFuser(self._fusion, self._place, self._vocab)


class GpuModel:
    """One language model's inference session."""

    def __init__(self, session: Any, place: Place, spec: Model, position_inputs: PositionInputs, capacity: int, vocab: int):
        self.session, self.place, self.spec, self.position_inputs = session, place, spec, position_inputs
        self.capacity, self.vocab = capacity, vocab
        self.experts = next((value.shape[-1] for value in session.get_outputs() if value.name == "routing"), 0)
        self.cache_type: str = next(value.type for value in session.get_inputs() if value.name.startswith("past."))
        self.keys: Inputs | None = None
        if position_inputs.keyed:
            self.keys = Inputs(place, {"key_positions": ((capacity,), np.int64)})
            self.keys.arrays["key_positions"][:] = np.arange(capacity)
            self.keys.send()

    def cache(self) -> GpuCache:
        """Device buffers of the full capacity."""
        return GpuCache(self)


class GpuCache:
    """KV buffers [1, kv_heads, capacity, head_size] per layer, each bound as both past and present.

    Decode steps have a binding of their own. It changes only when attention reads a longer part of the cache.
    """

    def __init__(self, model: GpuModel):
        self.length = 0
        self._model, spec = model, model.spec
        self._shape = (1, spec.kv_heads, model.capacity, spec.head_size)
        size = aligned(int(np.prod(self._shape)) * TYPES[model.cache_type][1])
        self._buffers = {
            f"{layer}.{kind}": model.place.zeros(size)  # keys beyond the text are masked, but 0 · NaN is NaN
            for layer in range(spec.layers)
            for kind in ("key", "value")
        }
        self._rows = Rows(model.place.buffer((1, model.vocab), np.float32), model.place.memory)
        self._routing = np.zeros((1, model.experts), np.float32) if model.experts else None
        self._reach: dict[int, int] = {}  # keys that each binding reads
        self._step = self._binding(), self._inputs(1, 1)
        self._step[1].bind(self._step[0])
        self._outputs(self._step[0], 1)
        self._chunks: tuple[Any, Inputs] | None = None

    def _binding(self) -> Any:
        """A binding with the caches bound."""
        binding, memory, dtype = self._model.session.io_binding(), self._model.place.memory, TYPES[self._model.cache_type][0]
        for name, buffer in self._buffers.items():
            binding.bind_input(f"past.{name}", memory, 0, dtype, self._shape, start(buffer))
            binding.bind_output(f"present.{name}", memory, 0, dtype, self._shape, start(buffer))
        return binding

    def _inputs(self, count: int, row_count: int) -> Inputs:
        """The small inputs for `count` tokens and `row_count` positions."""
        text: Layout = {"input_ids": ((1, count), np.int64), "logit_positions": ((row_count,), np.int64)}
        return Inputs(self._model.place, {**self._model.position_inputs.lengths, **text})

    def _outputs(self, binding: Any, row_count: int) -> Output:
        """Bind the outputs: one row of logits stays on the device; several rows, and all routing, go to the host."""
        model = self._model
        logits: Any = self._rows
        routing = self._routing
        if row_count == 1:
            binding.bind_output("logits", model.place.memory, 0, np.float32, (1, 1, model.vocab), self._rows.address)
        else:
            logits = np.empty((row_count, model.vocab), np.float32)
            routing = None if routing is None else np.empty((row_count, model.experts), np.float32)
            binding.bind_output("logits", "cpu", 0, np.float32, (1, *logits.shape), logits.ctypes.data)
        if routing is not None:
            binding.bind_output("routing", "cpu", 0, np.float32, (1, *routing.shape), routing.ctypes.data)
        return Output(logits, routing)

    def forward(self, ids: Sequence[int], positions: Sequence[int]) -> Output:
        """See `runtime.backend.Cache.forward`.

        One row stays on the device until the next call; several are arrays for the caller.
        """
        count, row_count, model = len(ids), len(positions), self._model
        output = Output(self._rows, self._routing)
        if (count, row_count) == (1, 1):
            binding, inputs = self._step
        else:
            binding, inputs = self._chunk(count, row_count)
            output = self._outputs(binding, row_count)
        arrays = inputs.arrays
        arrays["input_ids"][0] = ids
        arrays["logit_positions"][:] = positions
        model.position_inputs.fill(arrays, self.length, count)
        if model.keys is not None:
            keys = reach(self.length + count, model.capacity)
            if self._reach.get(id(binding)) != keys:
                model.keys.bind(binding, "key_positions", (keys,))
                self._reach[id(binding)] = keys
        inputs.send()
        try:
            model.session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime has no public base class for its errors
            raise FusionError(f"ONNX Runtime failed on {count} tokens of {model.spec.name}: {one_line(error)}") from error
        self.length += count
        return output

    def copy_prefix(self, other: GpuCache, length: int) -> None:
        """Does nothing: ONNX Runtime's Python API cannot copy from device to device (see
        `runtime.backend.Cache.copy_prefix`).
        """

    def interrupt(self) -> None:
        """See `runtime.backend.Cache.interrupt`: a run cannot be stopped."""

    def _chunk(self, count: int, row_count: int) -> tuple[Any, Inputs]:
        """The binding for chunks, and its inputs, which are new for each shape."""
        binding, inputs = self._chunks or (self._binding(), self._inputs(count, row_count))
        if self._chunks is None or (inputs.arrays["input_ids"].size, inputs.arrays["logit_positions"].size) != (count, row_count):
            inputs = self._inputs(count, row_count)
            inputs.bind(binding)
            self._chunks = binding, inputs
        return binding, inputs
