"""ONNX Runtime on an NVIDIA GPU: IO binding on buffers that stay on the device, whatever the execution provider (see providers.py).

A run ends with a wait for the device. Logits stay there and go to the fusion graph; candidates, normalisers and routing come back, a full row only
where it is asked for. Nothing is allocated per decoded token, but views of a few arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fusionroute.runtime.backends import ort
from fusionroute.runtime.backends.backend import Fused, FusionInputs, Output
from fusionroute.runtime.backends.device_buffers import Inputs, Layout, Place, aligned, start
from fusionroute.runtime.backends.providers import Opener, Provider
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.errors import BundleError, FusionError, one_line
from fusionroute.runtime.tensorrt.model import reach

if TYPE_CHECKING:
    from fusionroute.runtime.manifest import Model, Variant

# what a cache may hold: its type in numpy (in ONNX's numbers where numpy has none), and bytes of a value
TYPES: dict[str, tuple[Any, int]] = {"tensor(float)": (np.float32, 4), "tensor(float16)": (np.float16, 2), "tensor(bfloat16)": (16, 2)}


class Dialect(NamedTuple):
    """How the graphs of a target are told where they are in the text. keyed: they read as many keys as `key_positions` is long."""

    lengths: Layout
    fill: Callable[[dict[str, np.ndarray], int, int], None]  # (arrays, tokens in the cache, new tokens)
    keyed: bool


def fill_ort(arrays: dict[str, np.ndarray], length: int, count: int) -> None:
    """The text's length with the new tokens, twice."""
    arrays["seqlens_k"][0] = length + count - 1
    arrays["total_sequence_length"][()] = length + count


def fill_tensorrt(arrays: dict[str, np.ndarray], length: int, count: int) -> None:
    """Where the new tokens go."""
    arrays["write_index"][0] = length


DIALECTS = {
    "ort:cuda": Dialect({"seqlens_k": ((1,), np.int32), "total_sequence_length": ((), np.int32)}, fill_ort, False),
    "tensorrt": Dialect({"write_index": ((1,), np.int64)}, fill_tensorrt, True),
}


class OrtGpu:
    """All models of one variant, each in its own inference session on one provider."""

    prefill_chunk = 512
    async_dispatch = False

    def __init__(self, bundle: Bundle, variant: Variant, provider: Provider):
        opener = Opener(provider)
        manifest = bundle.manifest
        names = [variant.graphs[model.name] for model in manifest.models]
        sessions = [opener.open(bundle.folder / name, manifest, manifest.files[name].sha256) for name in names]
        ort.check(sessions, manifest.models, [bundle.folder / name for name in names], manifest.vocab_size)
        dialect = DIALECTS[variant.target]
        models = [
            GpuModel(session, opener.place(session), model, dialect, manifest.max_seq_len, manifest.vocab_size)
            for session, model in zip(sessions, manifest.models, strict=True)
        ]
        for model, name in zip(models, names, strict=True):
            if model.cache_type not in TYPES:
                raise BundleError(f"The caches of {bundle.folder / name} are {model.cache_type}: expected half precision or float32.")
        self.router, self.experts = models[0], models[1:]
        self._fusion = opener.open_fusion(bundle.folder / variant.fusion_graph)
        self._place = opener.place(self._fusion)
        self._vocab = manifest.vocab_size

    def fuser(self) -> GpuFuser:
        """A fuser with buffers of its own."""
        return GpuFuser(self._fusion, self._place, self._vocab)


class GpuModel:
    """One language model's inference session."""

    def __init__(self, session: Any, place: Place, spec: Model, dialect: Dialect, capacity: int, vocab: int):
        self.session, self.place, self.spec, self.dialect = session, place, spec, dialect
        self.capacity, self.vocab = capacity, vocab
        self.experts = next((value.shape[-1] for value in session.get_outputs() if value.name == "routing"), 0)
        self.cache_type: str = next(value.type for value in session.get_inputs() if value.name.startswith("past."))
        self.keys: Inputs | None = None
        if dialect.keyed:
            self.keys = Inputs(place, {"key_positions": ((capacity,), np.int64)})
            self.keys.arrays["key_positions"][:] = np.arange(capacity)
            self.keys.send()

    def cache(self) -> GpuCache:
        """Device buffers of the full capacity."""
        return GpuCache(self)


class Rows:
    """Logits that stay on the device, float32 [1, V]: reading them copies them."""

    def __init__(self, value: Any, memory: str):
        self._value, self.memory = value, memory
        self.address = int(value.data_ptr())

    def __len__(self) -> int:
        return 1

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self._value.numpy(), dtype)

    def __getitem__(self, key: Any) -> Any:
        return self.__array__()[key]

    def copy(self) -> np.ndarray:
        """The logits on the host."""
        return self.__array__()


class GpuCache:
    """KV buffers [1, kv_heads, capacity, head_size] per layer, each bound as both past and present.

    Decode steps have a binding of their own, which changes only where attention comes to read a longer part of the cache.
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
        """A binding of the caches."""
        binding, memory, dtype = self._model.session.io_binding(), self._model.place.memory, TYPES[self._model.cache_type][0]
        for name, buffer in self._buffers.items():
            binding.bind_input(f"past.{name}", memory, 0, dtype, self._shape, start(buffer))
            binding.bind_output(f"present.{name}", memory, 0, dtype, self._shape, start(buffer))
        return binding

    def _inputs(self, count: int, wanted: int) -> Inputs:
        """The small inputs for `count` tokens and `wanted` positions."""
        text: Layout = {"input_ids": ((1, count), np.int64), "logit_positions": ((wanted,), np.int64)}
        return Inputs(self._model.place, {**self._model.dialect.lengths, **text})

    def _outputs(self, binding: Any, wanted: int) -> Output:
        """Bind what comes out: one row of logits stays on the device, several and all routing go to the host."""
        model = self._model
        logits: Any = self._rows
        routing = self._routing
        if wanted == 1:
            binding.bind_output("logits", model.place.memory, 0, np.float32, (1, 1, model.vocab), self._rows.address)
        else:
            logits = np.empty((wanted, model.vocab), np.float32)
            routing = None if routing is None else np.empty((wanted, model.experts), np.float32)
            binding.bind_output("logits", "cpu", 0, np.float32, (1, *logits.shape), logits.ctypes.data)
        if routing is not None:
            binding.bind_output("routing", "cpu", 0, np.float32, (1, *routing.shape), routing.ctypes.data)
        return Output(logits, routing)

    def forward(self, ids: Sequence[int], positions: Sequence[int]) -> Output:
        """See `backend.Cache.forward`. One row stays on the device until the next call; several are arrays that belong to the caller."""
        count, wanted, model = len(ids), len(positions), self._model
        output = Output(self._rows, self._routing)
        if (count, wanted) == (1, 1):
            binding, inputs = self._step
        else:
            binding, inputs = self._chunk(count, wanted)
            output = self._outputs(binding, wanted)
        arrays = inputs.arrays
        arrays["input_ids"][0] = ids
        arrays["logit_positions"][:] = positions
        model.dialect.fill(arrays, self.length, count)
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
        """ONNX Runtime's Python API copies nothing from device to device: prompts are read again (see `backend.Cache.adopt`)."""

    def interrupt(self) -> None:
        """See `backend.Cache.interrupt`: a run goes on to its end."""

    def _chunk(self, count: int, wanted: int) -> tuple[Any, Inputs]:
        """The binding for chunks and its inputs, which change with their shape."""
        binding, inputs = self._chunks or (self._binding(), self._inputs(count, wanted))
        if self._chunks is None or (inputs.arrays["input_ids"].size, inputs.arrays["logit_positions"].size) != (count, wanted):
            inputs = self._inputs(count, wanted)
            inputs.bind(binding)
            self._chunks = binding, inputs
        return binding, inputs


class Plan:
    """The fusion graph bound for K positions, k candidates and P penalised ids."""

    def __init__(self, session: Any, place: Place, shape: tuple[int, int, int], rows: Any):
        count, k, penalised = shape
        self.binding = session.io_binding()
        self.inputs = Inputs(
            place,
            {
                "coefficients": ((2,), np.float32),
                "penalty": ((), np.float32),
                "temperature": ((), np.float32),
                "k": ((1,), np.int64),
                "penalty_ids": ((count, penalised), np.int64),
            },
        )
        self.inputs.bind(self.binding)
        self.bound: dict[str, int] = {}  # addresses of logits on the device
        self.kept: dict[str, np.ndarray] = {}  # logits that came from the host, for as long as they are bound
        self.rows = rows
        found: dict[str, np.ndarray] = {
            "candidate_ids": np.empty((count, k), np.int64),
            "candidate_logits": np.empty((count, k), np.float32),
            "unpenalised": np.empty((count, k), np.float32),
            "log_normaliser": np.empty(count, np.float32),
            "sampling_normaliser": np.empty(count, np.float32),
        }
        for name, array in found.items():
            self.binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self.binding.bind_output("fused", place.memory, 0, np.float32, rows.shape(), int(rows.data_ptr()))
        self.fused = GpuFused(found, rows)


class GpuFused:
    """See `backend.Fused`; `rows` are copied from the device when they are asked for."""

    def __init__(self, found: dict[str, np.ndarray], rows: Any):
        self.ids, self.logits, self.unpenalised = found["candidate_ids"], found["candidate_logits"], found["unpenalised"]
        self.log_normaliser, self.sampling_normaliser = found["log_normaliser"], found["sampling_normaliser"]
        self._rows = rows

    @property
    def rows(self) -> np.ndarray:
        """Fused and penalised logits, float32 [K, V]."""
        return np.asarray(self._rows.numpy())


class GpuFuser:
    """The fusion graph with one session's buffers (see `backend.Fuser`)."""

    def __init__(self, session: Any, place: Place, vocab: int):
        self._session, self._place, self._vocab = session, place, vocab
        self._plans: dict[tuple[int, int, int], Plan] = {}
        self._row = place.buffer((1, vocab), np.float32)

    def __call__(self, inputs: FusionInputs) -> Any:
        """A GpuFused, see `backend.Fuser`. `router` and `expert` are a model's `Rows`, or float32 [K, V] on the host."""
        router, expert, coefficients, k, penalty_ids, penalty, temperature = inputs
        if not len(penalty_ids):
            penalty_ids, penalty = np.zeros(1, np.int64), 1.0  # changes nothing, and no tensor is empty
        plan = self._plan((len(router), k, 1 << (len(penalty_ids) - 1).bit_length()))  # powers of two: few shapes
        arrays = plan.inputs.arrays
        for name, value in (("coefficients", coefficients), ("penalty", penalty), ("temperature", temperature), ("k", k)):
            arrays[name][...] = value
        arrays["penalty_ids"][:, : len(penalty_ids)] = penalty_ids
        arrays["penalty_ids"][:, len(penalty_ids) :] = penalty_ids[-1]  # an id may stand twice
        plan.inputs.send()
        self._bind(plan, "router_logits", router)
        self._bind(plan, "expert_logits", expert)
        try:
            self._session.run_with_iobinding(plan.binding)
        except Exception as error:  # ONNX Runtime has no public base class for its errors
            raise FusionError(f"ONNX Runtime failed on the fusion graph: {one_line(error)}") from error
        return plan.fused

    def row(self, fused: Fused) -> np.ndarray:
        """See `backend.Fuser.row`."""
        row: np.ndarray = fused.rows[0].copy()
        return row

    def _plan(self, shape: tuple[int, int, int]) -> Plan:
        """The buffers of a shape. Those of one row, which decoding needs, are kept; those of scoring serve once."""
        if shape in self._plans:
            return self._plans[shape]
        rows = self._row if shape[0] == 1 else self._place.buffer((shape[0], self._vocab), np.float32)
        plan = Plan(self._session, self._place, shape, rows)
        if shape[0] == 1:
            self._plans[shape] = plan
        return plan

    def _bind(self, plan: Plan, name: str, rows: Any) -> None:
        """Bind logits where they are, if the fusion runs there too; others are copied now."""
        if isinstance(rows, Rows) and rows.memory == self._place.memory and self._place.holds(name):
            if plan.bound.get(name) != rows.address:
                plan.binding.bind_input(name, self._place.memory, 0, np.float32, (1, self._vocab), rows.address)
                plan.bound[name] = rows.address
            return
        array = plan.kept[name] = np.ascontiguousarray(rows, np.float32)
        plan.binding.bind_cpu_input(name, array)
        plan.binding.synchronize_inputs()
        plan.bound.pop(name, None)
