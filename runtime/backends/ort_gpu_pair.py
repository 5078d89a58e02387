"""One graph for all models on ONNX Runtime's GPU providers: a pass reads tokens of the router and tokens of an expert.

As `ort_pair` on the CPU, with buffers that stay on the device. Passes keep an odd number of tokens: on a GPU a product
has other kernels for other numbers of rows in any case.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import TYPE_CHECKING, Any

import numpy as np

from fusionroute.runtime.backend import Arrays, Output, Segment
from fusionroute.runtime.backends import ort
from fusionroute.runtime.backends.device_buffers import Inputs, Layout, Place, Rows, aligned, start
from fusionroute.runtime.backends.gpu_fusion import GpuFuser
from fusionroute.runtime.backends.mapped_factors import factors_of
from fusionroute.runtime.backends.ort_gpu import TYPES
from fusionroute.runtime.backends.pair_graph import PairGraph
from fusionroute.runtime.backends.providers import Opener, Provider
from fusionroute.runtime.backends.signature import HALVES, WIDTHS, of_fusion
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.errors import BundleError, FusionError, one_line
from fusionroute.runtime.joint_cache import JointCache, read_both
from fusionroute.runtime.limits import EXPERT

if TYPE_CHECKING:
    from fusionroute.runtime.manifest import Pair, Variant

PREFIXES = ("", EXPERT)
IDLE_CAPACITY = 2  # tokens that the buffers of a model that does not read hold


class OrtGpuPair:
    """The models of one variant with a `pair`, all in one inference session on one provider."""

    prefill_chunk = 512
    on_host = False
    model_seconds = None
    async_dispatch = False
    forward_together = None
    guess_limit = 8  # tokens that are read beside the router's nearly for free, since a pass waits for the weights
    expect = None
    apart: frozenset[int] = frozenset()

    def __init__(self, bundle: Bundle, variant: Variant, pair: Pair, provider: Provider):
        """Raises BundleError for files that are not those of a pair, UnavailableError as `Opener`."""
        opener, manifest = Opener(provider), bundle.manifest
        session = opener.open(bundle, pair.graph)
        place = opener.place(session)
        self.target, self._head_rows, self._router_name = variant.target, manifest.rows, manifest.models[0].name
        graph = GpuPairGraph(session, place, manifest.models[0], manifest.max_seq_len, manifest.vocab_size, len(manifest.rows))
        sizes = {(each.layers, each.kv_heads, each.head_size) for each in manifest.models}
        graph.check(bundle, pair.graph, HALVES, WIDTHS)
        if len(sizes) > 1:
            raise BundleError(f"{bundle.folder} has one graph for models of several sizes; export the bundle again.")
        factors = factors_of(bundle, {name: pair.factors[name] for name in manifest.experts})
        for name, arrays in factors.items():
            if (wrong := graph.unfit(arrays)) is not None:
                raise BundleError(
                    f"{bundle.folder / pair.factors[name]} does not fit {pair.graph} (its input {wrong}); export the bundle again."
                )
        self.factors: Mapping[str, Arrays] = {}
        self._on_device: Mapping[str, DeviceFactors] = {}
        self._take(graph, factors)
        self._fusion = opener.open_fusion(bundle, variant.fusion_graph)
        ort.check(self._fusion, of_fusion(manifest.vocab_size), bundle, variant.fusion_graph)
        self._place = opener.place(self._fusion)
        self._vocab = manifest.vocab_size

    def _take(self, graph: GpuPairGraph, factors: Mapping[str, Arrays]) -> None:
        """Let the experts be those that have factors, in the order of the routing head's rows. Factors that were there
        stay where they are on the device.
        """
        names = [name for name in self._head_rows if name in factors]
        self._on_device = {
            name: self._on_device[name]
            if factors[name] is self.factors.get(name)
            else DeviceFactors(graph.place, graph.types, factors[name])
            for name in names
        }
        self._graph, self.factors = graph, factors
        graph.rows = None if names == self._head_rows else [self._head_rows.index(name) for name in names]
        self.router = GpuPairModel(graph, self._on_device[names[0]], self._router_name, is_expert=False)
        self.experts = [GpuPairModel(graph, self._on_device[name], name, is_expert=True) for name in names]

    def with_experts(self, factors: Mapping[str, Arrays]) -> OrtGpuPair:
        """See `runtime.backend.SharedBase.with_experts`."""
        other = copy(self)
        other._take(copy(self._graph), factors)
        return other

    def forward_both(self, router: GpuPairCache, own: Segment, expert: GpuPairCache, other: Segment) -> tuple[Output, Output]:
        """See `runtime.backend.Backend.forward_both`."""
        return read_both(router, own, expert, other)

    def fuser(self) -> GpuFuser:
        """A fuser with buffers of its own."""
        return GpuFuser(self._fusion, self._place, self._vocab)


class GpuPairGraph(PairGraph):
    """The inference session, its sizes, and where its inputs lie. `types`: of its inputs, as ONNX Runtime calls them."""

    def __init__(self, session: Any, place: Place, spec: Any, capacity: int, vocab: int, head_rows: int):
        super().__init__(session, lambda: None, spec, capacity, ("logits", vocab), None, head_rows)
        self.place, self.vocab = place, vocab
        self.types: dict[str, str] = {value.name: value.type for value in session.get_inputs()}
        self.cache_type = self.types.get("past.0.key", "")

    def unfit(self, factors: Arrays) -> str | None:
        """See `PairGraph.unfit`; types must fit too."""
        wrong = super().unfit(factors)
        widths = {name: TYPES.get(self.types[name], (None, 0))[1] for name in self.deltas}
        return wrong or next((name for name, width in widths.items() if factors[name].itemsize != width), None)


class DeviceFactors:
    """One expert's factors on the device, one behind the other."""

    def __init__(self, place: Place, types: Mapping[str, str], arrays: Mapping[str, np.ndarray]):
        size = sum(aligned(array.nbytes) for array in arrays.values())
        self._memory, self._value = place.memory, place.zeros(size)
        address = start(self._value)
        offset = address - int(self._value.data_ptr())
        staged = np.zeros(self._value.shape()[0], np.uint8)
        self._places: list[tuple[str, Any, tuple[int, ...], int]] = []
        for name, array in arrays.items():
            staged[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)
            self._places.append((name, TYPES[types[name]][0], array.shape, address))
            offset, address = offset + aligned(array.nbytes), address + aligned(array.nbytes)
        self._value.update_inplace(staged)

    def bind(self, binding: Any) -> None:
        """Bind them as inputs."""
        for name, dtype, shape, address in self._places:
            binding.bind_input(name, self._memory, 0, dtype, shape, address)


class GpuKeysValues:
    """One model's KV buffers [1, kv_heads, capacity, head_size] per layer, each bound as both past and present."""

    def __init__(self, graph: GpuPairGraph, capacity: int):
        spec = graph.spec
        self._shape = (1, spec.kv_heads, capacity, spec.head_size)
        self._dtype, width = TYPES[graph.cache_type]
        self._memory = graph.place.memory
        names = [f"{layer}.{kind}" for layer in range(spec.layers) for kind in ("key", "value")]
        size = aligned(int(np.prod(self._shape)) * width)
        self._buffers = {name: graph.place.zeros(size) for name in names}  # keys beyond the text are masked, but 0 · NaN is NaN

    def bind(self, binding: Any, prefix: str) -> None:
        """Bind as the model whose inputs begin with `prefix`."""
        for name, buffer in self._buffers.items():
            binding.bind_input(f"{prefix}past.{name}", self._memory, 0, self._dtype, self._shape, start(buffer))
            binding.bind_output(f"{prefix}present.{name}", self._memory, 0, self._dtype, self._shape, start(buffer))


class GpuPairModel:
    """One of the models. `factors` are bound where it reads: the router's own do not matter."""

    def __init__(self, graph: GpuPairGraph, factors: DeviceFactors, name: str, is_expert: bool):
        self.graph, self.factors, self.name, self.is_expert = graph, factors, name, is_expert

    def cache(self) -> GpuPairCache:
        """Device buffers of the full capacity."""
        return GpuPairCache(self)


class GpuPairCache(JointCache):
    """One model's KV buffers on a GPU."""

    def __init__(self, model: GpuPairModel):
        super().__init__(model.is_expert)
        self._model = model
        self._text = GpuKeysValues(model.graph, model.graph.capacity)

    def bind(self, router: GpuPairCache | None) -> GpuPairBinding:
        """See `JointCache.bind`."""
        model = self._model
        if router is not None:
            names = f"{router._model.name} and {model.name}"
            return GpuPairBinding(model.graph, (router._text, self._text), model.factors, names)
        nobody = GpuKeysValues(model.graph, IDLE_CAPACITY)
        texts = (nobody, self._text) if model.is_expert else (self._text, nobody)
        return GpuPairBinding(model.graph, texts, model.factors, model.name)

    def copy_prefix(self, other: GpuPairCache, length: int) -> None:
        """Does nothing: see `GpuCache.copy_prefix`."""

    def interrupt(self) -> None:
        """See `runtime.backend.Cache.interrupt`: a run cannot be stopped."""


class GpuPairBinding:
    """Everything that the passes of a router and an expert read and write. Joint steps have a binding of their own.

    names: of the models that read, for errors.
    """

    def __init__(self, graph: GpuPairGraph, texts: tuple[GpuKeysValues, GpuKeysValues], factors: DeviceFactors, names: str):
        self._graph, self._texts, self._factors, self._names = graph, texts, factors, names
        value = graph.place.buffer((2, graph.vocab), np.float32)
        self._rows = Rows(value, graph.place.memory), Rows(value, graph.place.memory, 1)
        self._routing = np.zeros((2, graph.head_rows), np.float32)
        self._step: tuple[Any, Inputs] | None = None
        self._chunks: tuple[Any, Inputs, tuple[int, int]] | None = None

    def run(self, segments: tuple[Segment, Segment], lengths: tuple[int, int]) -> tuple[Output, Output]:
        """One pass of the router's segment and the expert's behind so many tokens: the outputs of both.

        One row of each stays on the device until the next pass; several are arrays for the caller. Raises FusionError.
        """
        counts = len(segments[0].ids), len(segments[1].ids)
        answered = [segment.positions if len(segment.positions) else (0,) for segment in segments]  # a dummy's is in no way
        rows = len(answered[0]), len(answered[1])
        if counts == rows == (1, 1):
            binding, inputs = self._step = self._step or self._joint_step()
            outputs, routing = (Output(self._rows[0], None), Output(self._rows[1], None)), self._routing[:1]
        else:
            binding, inputs = self._chunk(sum(counts), sum(rows))
            outputs, routing = self._answers(binding, rows)
        arrays = inputs.arrays
        arrays["segments"][:] = counts
        arrays["input_ids"][0, : counts[0]], arrays["input_ids"][0, counts[0] :] = segments[0].ids, segments[1].ids
        arrays["logit_positions"][: rows[0]], arrays["logit_positions"][rows[0] :] = answered
        arrays["logit_positions"][rows[0] :] += counts[0]
        for prefix, length, count in zip(PREFIXES, lengths, counts, strict=True):
            arrays[f"{prefix}seqlens_k"][0] = length + count - 1
            arrays[f"{prefix}total_sequence_length"][()] = length + count
        inputs.send()
        try:
            self._graph.session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime has no public base class for its errors
            raise FusionError(f"ONNX Runtime failed on {sum(counts)} tokens of {self._names}: {one_line(error)}") from error
        scored = self._graph.rows
        return outputs[0]._replace(routing=routing if scored is None else routing[:, scored]), outputs[1]

    def _binding(self) -> Any:
        """A binding with caches and factors bound."""
        binding = self._graph.session.io_binding()
        for prefix, text in zip(PREFIXES, self._texts, strict=True):
            text.bind(binding, prefix)
        self._factors.bind(binding)
        return binding

    def _inputs(self, count: int, row_count: int) -> Inputs:
        """The small inputs for so many tokens and rows of both models."""
        layout: Layout = {
            "input_ids": ((1, count), np.int64), "segments": ((2,), np.int64), "logit_positions": ((row_count,), np.int64),
            **{f"{prefix}seqlens_k": ((1,), np.int32) for prefix in PREFIXES},
            **{f"{prefix}total_sequence_length": ((), np.int32) for prefix in PREFIXES},
        }  # fmt: skip
        return Inputs(self._graph.place, layout)

    def _joint_step(self) -> tuple[Any, Inputs]:
        """The binding for one token of each: both rows of logits stay on the device."""
        binding, inputs, graph = self._binding(), self._inputs(2, 2), self._graph
        inputs.bind(binding)
        binding.bind_output("logits", graph.place.memory, 0, np.float32, (1, 2, graph.vocab), self._rows[0].address)
        binding.bind_output("routing", "cpu", 0, np.float32, (1, *self._routing.shape), self._routing.ctypes.data)
        return binding, inputs

    def _chunk(self, count: int, row_count: int) -> tuple[Any, Inputs]:
        """The binding for chunks, and its inputs, which are new for each shape."""
        binding, inputs, shape = self._chunks or (self._binding(), None, (0, 0))
        if inputs is None or shape != (count, row_count):
            inputs = self._inputs(count, row_count)
            inputs.bind(binding)
            self._chunks = binding, inputs, (count, row_count)
        return binding, inputs

    def _answers(self, binding: Any, rows: tuple[int, int]) -> tuple[tuple[Output, Output], np.ndarray]:
        """Bind outputs for so many rows of each: one of each stays on the device, others are arrays for the caller. The
        router's scores are written beside them.
        """
        graph, count = self._graph, sum(rows)
        routing = np.empty((count, graph.head_rows), np.float32)
        binding.bind_output("routing", "cpu", 0, np.float32, (1, *routing.shape), routing.ctypes.data)
        if rows == (1, 1):
            binding.bind_output("logits", graph.place.memory, 0, np.float32, (1, 2, graph.vocab), self._rows[0].address)
            return (Output(self._rows[0], None), Output(self._rows[1], None)), routing[:1]
        logits = np.empty((count, graph.vocab), np.float32)
        binding.bind_output("logits", "cpu", 0, np.float32, (1, *logits.shape), logits.ctypes.data)
        return (Output(logits[: rows[0]], None), Output(logits[rows[0] :], None)), routing[: rows[0]]
