"""One graph for several models on ONNX Runtime's CPU provider: a pass reads tokens of the router and tokens of an expert.

The base's weights are read once for both segments. What makes an expert of the base are its factors, inputs that are
bound by address: another expert is another binding, and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import TYPE_CHECKING, Any

import numpy as np

from fusionroute.runtime.backend import Arrays, ForwardTogether, Fuser, Output, Segment
from fusionroute.runtime.backends import ort
from fusionroute.runtime.backends.cpu_fusion import OrtFuser
from fusionroute.runtime.backends.cpu_sessions import CpuSessions
from fusionroute.runtime.backends.expert_segments import ExpertSegments, SegmentModel, read_together
from fusionroute.runtime.backends.hidden_rows import Head
from fusionroute.runtime.backends.host_memory import HostMemory
from fusionroute.runtime.backends.keys_values import KeysValues, Storage, storage_of
from fusionroute.runtime.backends.mapped_factors import factors_of
from fusionroute.runtime.backends.ort_cpu import OrtModel
from fusionroute.runtime.backends.pair_binding import PairBinding
from fusionroute.runtime.backends.pair_fusion import PairFuser
from fusionroute.runtime.backends.pair_graph import PairGraph
from fusionroute.runtime.backends.residency import OpenedModel, always
from fusionroute.runtime.backends.signature import lengths_of, of_head, of_model
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.errors import BundleError
from fusionroute.runtime.joint_cache import JointCache, read_both

if TYPE_CHECKING:
    from fusionroute.runtime.manifest import Pair, Variant


class OrtPair:
    """The models of one variant with a `pair`: those of its graph in one inference session, and their head in another.
    Each other expert has a session of its own.

    `share_weights`: see `prepacked_weights`. `exact`: see `PairFuser`.
    """

    prefill_chunk = 256  # see `OrtCpu`
    on_host = True
    async_dispatch = False
    guess_limit = 8  # tokens that are read beside the router's nearly for free; more cost as much as a pass of their own
    expect = None

    def __init__(
        self, bundle: Bundle, variant: Variant, pair: Pair, threads: int | None = None, *, share_weights: bool = False, exact: bool = False
    ):
        """Raises BundleError for files that are not those of a pair, UnavailableError without onnxruntime."""
        manifest = bundle.manifest
        self._storage = storage = storage_of(variant)
        opened = CpuSessions(bundle, variant, threads)
        router = manifest.models[0]
        session = opened.model(router.name, pair.graph, share_weights)
        head = None
        if pair.head is not None:
            head = Head(opened.model(router.name, pair.head, share_weights), manifest.vocab_size)
            ort.check(head.session, of_head(head.width, manifest.vocab_size), bundle, pair.head)
        result = ("logits", manifest.vocab_size) if head is None else ("hidden", head.width)
        kind = ExpertSegments if pair.every_expert else PairGraph
        graph = kind(session, opened.run_options, router, manifest.max_seq_len, result, head, len(manifest.rows))
        sizes = {(each.layers, each.kv_heads, each.head_size) for each in manifest.models if each.name not in variant.graphs}
        graph.check(bundle, pair.graph, storage.declared)
        if len(sizes) > 1:
            raise BundleError(f"{bundle.folder} has one graph for models of several sizes; export the bundle again.")
        factors = factors_of(bundle, {name: pair.factors[name] for name in manifest.experts if name in pair.factors})
        for name, arrays in factors.items():
            narrow = next((each for each, array in arrays.items() if array.dtype != np.float32), None)
            if (wrong := graph.unfit(arrays) or narrow) is not None:
                raise BundleError(
                    f"{bundle.folder / pair.factors[name]} does not fit {pair.graph} (its input {wrong}); export the bundle again."
                )
        self.target = variant.target
        self._head_rows, self._router_name = manifest.rows, router.name
        self._whole = open_whole(bundle, variant, opened, storage, share_weights)
        self._take(graph, factors)
        self._fusion = opened.fusion()
        self._head, self._linear, self._exact = head, pair.head_is_linear, exact
        self._vocab = manifest.vocab_size

    def _take(self, graph: PairGraph, factors: Mapping[str, Arrays]) -> None:
        """Let the experts be those that have factors, and those apart, in the order of the routing head's rows."""
        names = [name for name in self._head_rows if name in factors or name in self._whole]
        self._graph, self.factors = graph, factors
        graph.rows = None if names == self._head_rows else [self._head_rows.index(name) for name in names]
        self.router: Any  # `SegmentModel` or `PairModel`
        self.experts: list[Any]  # like it, and `OrtModel` for those apart
        if isinstance(graph, ExpertSegments):
            graph = graph.with_factors({self._head_rows.index(name): factors[name] for name in names})
            self.router = SegmentModel(graph, 0, self._router_name, self._storage)
            self.experts = [SegmentModel(graph, self._head_rows.index(name) + 1, name, self._storage) for name in names]
        else:
            self.router = PairModel(graph, next(iter(factors.values())), self._router_name, self._storage, is_expert=False)
            self.experts = [self._whole.get(name) or PairModel(graph, factors[name], name, self._storage, is_expert=True) for name in names]
        self.apart = frozenset(number for number, name in enumerate(names) if name in self._whole)

    def with_experts(self, factors: Mapping[str, Arrays]) -> OrtPair:
        """See `runtime.backend.SharedBase.with_experts`."""
        other = copy(self)
        other._take(copy(self._graph), factors)
        return other

    @property
    def model_seconds(self) -> float:
        """See `runtime.backend.Backend.model_seconds`; those of the head too."""
        head = 0.0 if self._head is None else self._head.seconds
        return self._graph.seconds + head + sum(model.seconds for model in self._whole.values())

    def forward_both(self, router: Any, own: Segment, expert: Any, other: Segment) -> tuple[Output, Output]:
        """See `runtime.backend.Backend.forward_both`."""
        if self.forward_together is None:
            return read_both(router, own, expert, other)
        routed, answered = read_together([(router, own), (expert, other)])
        return routed, answered

    @property
    def forward_together(self) -> ForwardTogether | None:
        """See `runtime.backend.Backend.forward_together`."""
        return read_together if isinstance(self._graph, ExpertSegments) else None

    def fuser(self) -> Fuser:
        """A fuser with buffers of its own."""
        fuser = OrtFuser(self._fusion, self._vocab)
        return fuser if self._head is None else PairFuser(fuser, self._head, self._linear, self._exact)


def open_whole(bundle: Bundle, variant: Variant, opened: CpuSessions, storage: Storage, share_weights: bool) -> dict[str, OrtModel]:
    """The experts that have graphs of their own. Raises as `OrtPair`."""
    manifest, models = bundle.manifest, {}
    for spec in (each for each in manifest.models if each.name in variant.graphs):
        session = opened.model(spec.name, variant.graphs[spec.name], share_weights)
        logits = "logits", manifest.vocab_size
        window = variant.windows.get(spec.name)
        signature = of_model(spec, manifest.max_seq_len, logits, 0, lengths_of(window), storage.declared)
        ort.check(session, signature, bundle, variant.graphs[spec.name], manifest.max_seq_len)
        models[spec.name] = OrtModel(
            always(OpenedModel(session)), opened.run_options, spec, manifest.max_seq_len, manifest.vocab_size, 0, storage, window
        )
    return models


class PairModel:
    """One of the models: the router, or an expert. `factors` are bound where it reads: the router's own do not matter."""

    def __init__(self, graph: PairGraph, factors: Arrays, name: str, storage: Storage, is_expert: bool):
        self.graph, self.factors, self.name, self.storage, self.is_expert = graph, factors, name, storage, is_expert

    def cache(self) -> PairCache:
        """Buffers of the full capacity. The operating system maps their pages when they are first written."""
        return PairCache(self)


class PairCache(HostMemory, JointCache):
    """One model's KV cache on the CPU."""

    def __init__(self, model: PairModel):
        super().__init__(model.is_expert)
        self._model, graph = model, model.graph
        self.memory = KeysValues(graph.spec, graph.capacity, model.storage)
        self.options = graph.run_options()

    def bind(self, router: PairCache | None) -> PairBinding:
        """See `JointCache.bind`."""
        model = self._model
        if router is not None:
            names = f"{router._model.name} and {model.name}"
            return PairBinding(model.graph, router.memory, self.memory, model.factors, router.options, names)
        nobody = KeysValues(model.graph.spec, 2, model.storage)
        memories = (nobody, self.memory) if model.is_expert else (self.memory, nobody)
        return PairBinding(model.graph, *memories, model.factors, self.options, model.name)
