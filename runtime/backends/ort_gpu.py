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
from fusionroute.runtime.backends.residency import Lease, OpenedModel, Residency, always
from fusionroute.runtime.backends.signature import HALVES, ORT_LENGTHS, TENSORRT_LENGTHS, Values, of_fusion
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.errors import FusionError, one_line
from fusionroute.runtime.expert_memory import check_budget
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
    """All models of one variant, each in its own inference session on one provider. `expert_memory`: see `OrtCpu`; here
    weights take on the device what they take in the bundle.
    """

    prefill_chunk = 512
    on_host = False
    model_seconds = None
    async_dispatch = False
    guess_limit = 0
    apart: frozenset[int] = frozenset()
    forward_both = None
    forward_together = None

    def __init__(self, bundle: Bundle, variant: Variant, provider: Provider, expert_memory: int | None = None):
        manifest = bundle.manifest
        names = [variant.graphs[model.name] for model in manifest.models]
        sizes = [] if expert_memory is None else [bundle.stored_bytes(name) for name in names[1:]]
        if expert_memory is not None:
            check_budget(expert_memory, max(sizes))
        opener = Opener(provider)
        position_inputs = POSITION_INPUTS[variant.target]

        def open_model(number: int) -> OpenedModel:
            session = opener.open(bundle, names[number])
            ort.check_model(session, bundle, number, names[number], position_inputs.signature, HALVES)
            return OpenedModel(session)

        self.expect: Callable[[int], None] | None = None
        if expert_memory is None:
            leases = [always(open_model(number)) for number in range(len(names))]
        else:
            residency = Residency(expert_memory, sizes, lambda expert: open_model(expert + 1))
            leases, self.expect = [always(open_model(0)), *residency.leases], residency.expect
        models = [
            GpuModel(lease, opener, model, position_inputs, manifest.max_seq_len, manifest.vocab_size)
            for lease, model in zip(leases, manifest.models, strict=True)
        ]
        self.router, self.experts = models[0], models[1:]
        self._fusion = opener.open_fusion(bundle, variant.fusion_graph)
        ort.check(self._fusion, of_fusion(manifest.vocab_size), bundle, variant.fusion_graph)
        self._place = opener.place(self._fusion)
        self._vocab = manifest.vocab_size

    def fuser(self) -> GpuFuser:
        """A fuser with buffers of its own."""
        return GpuFuser(self._fusion, self._place, self._vocab)


class Facts(NamedTuple):
    """What the first session of a model tells of all: where inputs lie, the type of its caches, how many experts a router
    scores (else 0), and 0, 1, 2, … on the device for graphs that are keyed.
    """

    place: Place
    cache_type: str
    experts: int
    keys: Inputs | None


class GpuModel:
    """One language model. `lease`: gives its inference session for a pass."""

    def __init__(self, lease: Lease, opener: Opener, spec: Model, position_inputs: PositionInputs, capacity: int, vocab: int):
        self.lease, self.spec, self.position_inputs = lease, spec, position_inputs
        self.capacity, self.vocab = capacity, vocab
        self._opener = opener
        self._facts: Facts | None = None

    def facts(self, session: Any) -> Facts:
        """Read from one of the model's sessions once."""
        if self._facts is None:
            place = self._opener.place(session)
            experts = next((value.shape[-1] for value in session.get_outputs() if value.name == "routing"), 0)
            cache_type = next(value.type for value in session.get_inputs() if value.name.startswith("past."))
            keys = None
            if self.position_inputs.keyed:
                keys = Inputs(place, {"key_positions": ((self.capacity,), np.int64)})
                keys.arrays["key_positions"][:] = np.arange(self.capacity)
                keys.send()
            self._facts = Facts(place, cache_type, experts, keys)
        return self._facts

    def cache(self) -> GpuCache:
        """Device buffers of the full capacity. Raises what opening an evicted expert raises."""
        with self.lease() as opened:
            return GpuCache(self, self.facts(opened.session))


class GpuCache:
    """KV buffers [1, kv_heads, capacity, head_size] per layer, and the routing and newest row of logits."""

    def __init__(self, model: GpuModel, facts: Facts):
        self.length = 0
        self._model, spec, place = model, model.spec, facts.place
        shape = (1, spec.kv_heads, model.capacity, spec.head_size)
        size = aligned(int(np.prod(shape)) * TYPES[facts.cache_type][1])
        buffers = {
            f"{layer}.{kind}": place.zeros(size)  # keys beyond the text are masked, but 0 · NaN is NaN
            for layer in range(spec.layers)
            for kind in ("key", "value")
        }
        rows = Rows(place.buffer((1, model.vocab), np.float32), place.memory)
        self._memory = Memory(buffers, shape, rows, np.zeros((1, facts.experts), np.float32) if facts.experts else None)

    def forward(self, ids: Sequence[int], positions: Sequence[int]) -> Output:
        """See `runtime.backend.Cache.forward`. Raises also what opening an evicted expert raises.

        One row stays on the device until the next call; several are arrays for the caller.
        """
        model = self._model
        with model.lease() as opened:
            bound = opened.bindings.get(self)
            if bound is None:
                bound = opened.bindings[self] = Bound(opened.session, model, model.facts(opened.session), self._memory)
            binding, output = bound.fill(opened.session, ids, positions, self.length)
            try:
                opened.session.run_with_iobinding(binding)
            except Exception as error:  # ONNX Runtime has no public base class for its errors
                raise FusionError(f"ONNX Runtime failed on {len(ids)} tokens of {model.spec.name}: {one_line(error)}") from error
        self.length += len(ids)
        return output

    def copy_prefix(self, other: GpuCache, length: int) -> None:
        """Does nothing: ONNX Runtime's Python API cannot copy from device to device (see
        `runtime.backend.Cache.copy_prefix`).
        """

    def interrupt(self) -> None:
        """See `runtime.backend.Cache.interrupt`: a run cannot be stopped."""


class Memory(NamedTuple):
    """What a cache keeps where the model runs: keys and values of one shape, one row of logits, and a router's scores."""

    buffers: dict[str, Any]
    shape: tuple[int, ...]
    rows: Rows
    routing: np.ndarray | None


class Bound:
    """A cache bound to one session of its model: decode steps, and chunks of the shape that was read last.

    The binding of decode steps changes only when attention reads a longer part of the cache.
    """

    def __init__(self, session: Any, model: GpuModel, facts: Facts, memory: Memory):
        """The session is not kept: it may be closed before this object goes."""
        self._model, self._facts, self._memory = model, facts, memory
        self._reach: dict[int, int] = {}  # keys that each binding reads
        self._step = self._binding(session), self._inputs(1, 1)
        self._step[1].bind(self._step[0])
        self._outputs(self._step[0], 1)
        self._chunks: tuple[Any, Inputs] | None = None

    def fill(self, session: Any, ids: Sequence[int], positions: Sequence[int], length: int) -> tuple[Any, Output]:
        """The binding of a pass behind `length` tokens, its inputs sent, and the output that the pass will have written."""
        count, row_count = len(ids), len(positions)
        output = Output(self._memory.rows, self._memory.routing)
        if (count, row_count) == (1, 1):
            binding, inputs = self._step
        else:
            binding, inputs = self._chunk(session, count, row_count)
            output = self._outputs(binding, row_count)
        arrays = inputs.arrays
        arrays["input_ids"][0] = ids
        arrays["logit_positions"][:] = positions
        self._model.position_inputs.fill(arrays, length, count)
        if self._facts.keys is not None:
            keys = reach(length + count, self._model.capacity)
            if self._reach.get(id(binding)) != keys:
                self._facts.keys.bind(binding, "key_positions", (keys,))
                self._reach[id(binding)] = keys
        inputs.send()
        return binding, output

    def _binding(self, session: Any) -> Any:
        """A binding with the caches bound, each as both past and present."""
        binding, place, dtype = session.io_binding(), self._facts.place, TYPES[self._facts.cache_type][0]
        for name, buffer in self._memory.buffers.items():
            binding.bind_input(f"past.{name}", place.memory, 0, dtype, self._memory.shape, start(buffer))
            binding.bind_output(f"present.{name}", place.memory, 0, dtype, self._memory.shape, start(buffer))
        return binding

    def _inputs(self, count: int, row_count: int) -> Inputs:
        """The small inputs for `count` tokens and `row_count` positions."""
        text: Layout = {"input_ids": ((1, count), np.int64), "logit_positions": ((row_count,), np.int64)}
        return Inputs(self._facts.place, {**self._model.position_inputs.lengths, **text})

    def _outputs(self, binding: Any, row_count: int) -> Output:
        """Bind the outputs: one row of logits stays on the device; several rows, and all routing, go to the host."""
        place, vocab = self._facts.place, self._model.vocab
        logits: Any = self._memory.rows
        routing = self._memory.routing
        if row_count == 1:
            binding.bind_output("logits", place.memory, 0, np.float32, (1, 1, vocab), self._memory.rows.address)
        else:
            logits = np.empty((row_count, vocab), np.float32)
            routing = None if routing is None else np.empty((row_count, self._facts.experts), np.float32)
            binding.bind_output("logits", "cpu", 0, np.float32, (1, *logits.shape), logits.ctypes.data)
        if routing is not None:
            binding.bind_output("routing", "cpu", 0, np.float32, (1, *routing.shape), routing.ctypes.data)
        return Output(logits, routing)

    def _chunk(self, session: Any, count: int, row_count: int) -> tuple[Any, Inputs]:
        """The binding for chunks, and its inputs, which are new for each shape."""
        binding, inputs = self._chunks or (self._binding(session), self._inputs(count, row_count))
        if self._chunks is None or (inputs.arrays["input_ids"].size, inputs.arrays["logit_positions"].size) != (count, row_count):
            inputs = self._inputs(count, row_count)
            inputs.bind(binding)
            self._chunks = binding, inputs
        return binding, inputs
