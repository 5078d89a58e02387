"""One graph for all models on ONNX Runtime's CPU provider: a pass reads tokens of the router and tokens of an expert.

The base's weights are read once for both segments. What makes an expert of the base are its factors, inputs that are
bound by address: another expert is another binding, and nothing is copied.

Neither segment may be empty: where one model reads alone, a dummy token stands for the other one. A dummy token also
makes an odd number of tokens even. Products take rows by twos, and a single row has another kernel, which rounds
differently: so an expert's answer does not depend on what the router reads beside it, or whether it does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fusionroute.runtime.backend import REUSED, Output, Segment
from fusionroute.runtime.backends import ort
from fusionroute.runtime.backends.cpu_fusion import OrtFuser
from fusionroute.runtime.backends.cpu_sessions import CpuSessions, zeros
from fusionroute.runtime.backends.mapped_factors import map_factors
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.cancellation import Interrupted
from fusionroute.runtime.errors import BundleError, FusionError, one_line

if TYPE_CHECKING:
    from fusionroute.runtime.manifest import Model, Pair, Variant

EXPERT, DELTA = "expert.", "delta."  # in front of the names of the expert's inputs and outputs, and of its factors
IDLE = Segment((0,), ())  # of a model that does not read


class OrtPair:
    """The models of one variant with a `pair`, all in one inference session. `share_weights`: see `prepacked_weights`."""

    prefill_chunk = 256  # see `OrtCpu`
    async_dispatch = False
    guess_limit = 8  # tokens that are read beside the router's nearly for free; more cost as much as a pass of their own

    def __init__(self, bundle: Bundle, variant: Variant, pair: Pair, threads: int | None = None, *, share_weights: bool = False):
        """Raises BundleError for files that are not those of a pair, UnavailableError without onnxruntime."""
        manifest = bundle.manifest
        opened = CpuSessions(bundle, variant, threads)
        router = manifest.models[0]
        session = opened.model(router.name, pair.graph, share_weights)
        graph = PairGraph(session, opened.run_options, router, manifest.max_seq_len, manifest.vocab_size, len(manifest.experts))
        if not graph.fits():
            raise BundleError(
                f"The graph {bundle.folder / pair.graph} does not have the inputs and outputs that the manifest describes; "
                "export the bundle again."
            )
        factors = {name: map_factors(bundle.folder / path) for name, path in pair.factors.items()}
        for name, arrays in factors.items():
            if (wrong := graph.unfit(arrays)) is not None:
                raise BundleError(
                    f"{bundle.folder / pair.factors[name]} does not fit {pair.graph} (its input {wrong}); export the bundle again."
                )
        self.router = PairModel(graph, factors[manifest.experts[0]], router.name, is_expert=False)
        self.experts = [PairModel(graph, factors[name], name, is_expert=True) for name in manifest.experts]
        self._fusion = opened.fusion()
        self._vocab = manifest.vocab_size

    def forward_both(self, router: PairCache, own: Segment, expert: PairCache, other: Segment) -> tuple[Output, Output]:
        """See `runtime.backend.Backend.forward_both`."""
        rows = expert.beside(router).run((own, other), (router.length, expert.length), router.options)
        router.length += len(own.ids)
        expert.length += len(other.ids)
        first = len(own.positions)
        assert rows.routing is not None
        return Output(rows.logits[:first], rows.routing[:first]), Output(rows.logits[first:], None)

    def fuser(self) -> OrtFuser:
        """A fuser with buffers of its own."""
        return OrtFuser(self._fusion, self._vocab)


class PairGraph:
    """The inference session and its sizes."""

    def __init__(self, session: Any, run_options: Callable[[], Any], spec: Model, capacity: int, vocab: int, experts: int):
        self.session, self.run_options, self.spec = session, run_options, spec
        self.capacity, self.vocab, self.experts = capacity, vocab, experts
        values = (*session.get_inputs(), *session.get_outputs())
        self._shapes: dict[str, tuple[int | str, ...]] = {value.name: tuple(value.shape) for value in values}
        self.deltas = {name: shape for name, shape in self._shapes.items() if name.startswith(DELTA)}

    def fits(self) -> bool:
        """Whether its inputs and outputs are those of the manifest: buffers are bound by address."""
        shapes = self._shapes
        own = [name for name in shapes if name.startswith(("past.", "present."))]
        return (
            ort.fits(self.session, self.spec, self.vocab, self.experts)
            and all(shapes.get(EXPERT + name, ())[1::2] == shapes[name][1::2] for name in own)
            and shapes.get("segments") == (2,)
        )

    def unfit(self, factors: dict[str, np.ndarray]) -> str | None:
        """The first input that an expert's factors do not fit; None: they fit. Names in a shape stand for any rank."""
        for name, shape in self.deltas.items():
            given = factors[name].shape if name in factors else ()
            if len(given) != len(shape) or any(isinstance(size, int) and size != other for size, other in zip(shape, given, strict=True)):
                return name
        return None


class PairModel:
    """One of the models: the router, or an expert. `factors` are bound where it reads: the router's own do not matter."""

    def __init__(self, graph: PairGraph, factors: dict[str, np.ndarray], name: str, is_expert: bool):
        self.graph, self.factors, self.name, self.is_expert = graph, factors, name, is_expert

    def cache(self) -> PairCache:
        """Buffers of the full capacity. The operating system maps their pages when they are first written."""
        return PairCache(self)


class KeysValues:
    """KV buffers [1, kv_heads, capacity, head_size] per layer, and the inputs that tell how many tokens they hold."""

    def __init__(self, spec: Model, capacity: int):
        self.shape = (1, spec.kv_heads, capacity, spec.head_size)
        self.buffers = zeros((2 * spec.layers, *self.shape))
        self.names = [f"{layer}.{kind}" for layer in range(spec.layers) for kind in ("key", "value")]
        self.last, self.total = np.zeros(1, np.int32), np.zeros((), np.int32)

    def bind(self, binding: Any, prefix: str) -> None:
        """Bind as both past and present of the model whose inputs begin with `prefix`."""
        for name, buffer in zip(self.names, self.buffers, strict=True):
            binding.bind_input(f"{prefix}past.{name}", "cpu", 0, np.float32, self.shape, buffer.ctypes.data)
            binding.bind_output(f"{prefix}present.{name}", "cpu", 0, np.float32, self.shape, buffer.ctypes.data)
        binding.bind_input(f"{prefix}seqlens_k", "cpu", 0, np.int32, (1,), self.last.ctypes.data)
        binding.bind_input(f"{prefix}total_sequence_length", "cpu", 0, np.int32, (), self.total.ctypes.data)

    def set_total(self, total: int) -> None:
        """How many tokens the buffers hold at the end of the next pass."""
        self.last[0], self.total[()] = total - 1, total


class PairCache:
    """One model's KV cache, and the bindings of the passes that write it."""

    def __init__(self, model: PairModel):
        self.length = 0
        self._model, graph = model, model.graph
        self.memory = KeysValues(graph.spec, graph.capacity)
        self.options = graph.run_options()
        self._alone: PairBinding | None = None
        self._beside: tuple[PairCache, PairBinding] | None = None

    def forward(self, ids: Sequence[int], positions: Sequence[int]) -> Output:
        """See `runtime.backend.Cache.forward`."""
        own = Segment(ids, positions)
        if self._alone is None:
            self._alone = self._bind_alone()
        if self._model.is_expert:
            output = self._alone.run((IDLE, own), (0, self.length), self.options)._replace(routing=None)
        else:
            output = self._alone.run((own, IDLE), (self.length, 0), self.options)
        self.length += len(ids)
        return output

    def _bind_alone(self) -> PairBinding:
        model, nobody = self._model, KeysValues(self._model.graph.spec, 2)
        memories = (nobody, self.memory) if model.is_expert else (self.memory, nobody)
        return PairBinding(model.graph, *memories, model.factors, model.name)

    def beside(self, router: PairCache) -> PairBinding:
        """The binding of passes that an expert's cache shares with the router's."""
        if self._beside is None or self._beside[0] is not router:
            model = self._model
            names = f"{router._model.name} and {model.name}"
            self._beside = router, PairBinding(model.graph, router.memory, self.memory, model.factors, names)
        return self._beside[1]

    def copy_prefix(self, other: PairCache, length: int) -> None:
        """See `runtime.backend.Cache.copy_prefix`."""
        self.memory.buffers[..., :length, :] = other.memory.buffers[..., :length, :]
        self.length = length

    def interrupt(self) -> None:
        """See `runtime.backend.Cache.interrupt`. ONNX Runtime checks between two operators."""
        self.options.terminate = True


class PairBinding:
    """Everything that the passes of a router and an expert read and write, bound once but for what changes its shape.

    names: of the models that read, for errors.
    """

    def __init__(self, graph: PairGraph, router: KeysValues, expert: KeysValues, factors: dict[str, np.ndarray], names: str):
        self._graph, self._memories, self._names = graph, (router, expert), names
        self._run = graph.session.run_with_iobinding
        self._binding = binding = graph.session.io_binding()
        router.bind(binding, "")
        expert.bind(binding, EXPERT)
        for name in graph.deltas:
            array = factors[name]
            binding.bind_input(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
        self._factors = factors  # bound by address: kept alive
        capacity = router.shape[2] + expert.shape[2]
        self._ids, self._counts = np.zeros((1, capacity), np.int64), np.zeros(2, np.int64)
        binding.bind_input("segments", "cpu", 0, np.int64, (2,), self._counts.ctypes.data)
        self._bound = (0, 0)  # tokens and rows that are bound now
        self._reused = self._new_rows(2)  # grows to the most rows asked for, up to 2 · REUSED
        self._positions = np.zeros(2, np.int64)
        self._rows = self._reused

    def _new_rows(self, row_count: int) -> tuple[np.ndarray, np.ndarray]:
        graph = self._graph
        return np.empty((row_count, graph.vocab), np.float32), np.empty((row_count, graph.experts), np.float32)

    def run(self, segments: tuple[Segment, Segment], lengths: tuple[int, int], options: Any) -> Output:
        """One pass of the router's segment and the expert's behind so many tokens.

        Rows of the router first. With at most REUSED of each the next pass overwrites them. Raises Interrupted, once
        `terminate` is set in the options, and FusionError.
        """
        own, other = segments
        first, row_count = len(own.positions), len(own.positions) + len(other.positions)
        counts = self._even_counts(len(own.ids), len(other.ids), lengths)
        read, padded = sum(counts), row_count + row_count % 2  # the head's product takes rows by twos too
        fresh = max(first, row_count - first) > REUSED
        if self._bound != (read, padded):
            self._bind(read, padded, fresh)
        self._counts[:] = counts
        ids, positions = self._ids[0], self._positions
        ids[: len(own.ids)], ids[counts[0] : counts[0] + len(other.ids)] = own.ids, other.ids  # dummies: whatever is there
        positions[:first], positions[first:row_count] = own.positions, other.positions
        positions[first:row_count] += counts[0]
        positions[row_count:] = positions[row_count - 1]
        for memory, length, count in zip(self._memories, lengths, counts, strict=True):
            memory.set_total(length + count)
        options.terminate = False
        try:
            self._run(self._binding, options)
        except Exception as error:
            if options.terminate:
                raise Interrupted from error
            raise FusionError(f"ONNX Runtime failed on {read} tokens of {self._names}: {one_line(error)}") from error
        logits, routing = self._rows
        if fresh:  # those arrays now belong to the caller
            self._bound, self._rows = (0, 0), self._reused
        return Output(logits[:row_count], routing[:row_count])

    def _even_counts(self, own: int, other: int, lengths: tuple[int, int]) -> list[int]:
        """How many tokens of each a pass reads: one more where their sum is odd, if its buffers have room.

        The longer segment takes it: attention and the factors' products have other kernels for a single token.
        """
        counts = [own, other]
        if (own + other) % 2:
            longer = int(other > own)
            for place in (longer, 1 - longer):
                if lengths[place] + counts[place] < self._memories[place].shape[2]:
                    counts[place] += 1
                    break
        return counts

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
        for name, array in zip(("logits", "routing"), self._rows, strict=True):
            binding.bind_output(name, "cpu", 0, np.float32, (1, *array.shape), array.ctypes.data)
        self._bound = (count, row_count)
