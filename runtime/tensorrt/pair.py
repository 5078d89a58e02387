"""One engine for all models on one CUDA device: a pass reads tokens of the router and tokens of an expert.

The base's weights are read once for both. What makes an expert of the base are its factors, inputs of the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from fusionroute.runtime.backend import Fuser, Segment
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.errors import BundleError
from fusionroute.runtime.joint_cache import JointCache, read_both
from fusionroute.runtime.limits import DELTA
from fusionroute.runtime.manifest import BASE, FUSION, Pair, Variant
from fusionroute.runtime.tensorrt.device import Device
from fusionroute.runtime.tensorrt.factors import Arrays, FactorSlots
from fusionroute.runtime.tensorrt.fit import check, check_fusion
from fusionroute.runtime.tensorrt.fusion import DeviceFuser
from fusionroute.runtime.tensorrt.keys_values import KeysValues, new_rows, token_bytes
from fusionroute.runtime.tensorrt.loading import BYTES, Engine, Loader
from fusionroute.runtime.tensorrt.pair_pass import PREFIXES, PairEngine, PairPass, Unread
from fusionroute.runtime.tensorrt.shared import Shared


class TensorRtPair:
    """The models of one variant with a `pair`. `expert_memory`: bytes of device memory for factors; None: no limit.

    Everything runs on one stream: models and fusion take turns in any case, and share one scratch memory.
    """

    prefill_chunk = 512  # the largest of the engine's profile: see `profile`
    forward_together = None
    on_host = False
    model_seconds = None
    async_dispatch = True  # a forward pass is queued, and runs while the host goes on
    guess_limit = 8  # tokens that are read beside the router's nearly for free, since a pass waits for the weights
    expect = None
    apart: frozenset[int] = frozenset()

    def __init__(
        self,
        bundle: Bundle,
        variant: Variant,
        pair: Pair,
        factors: Mapping[str, Arrays],
        flavour: str,
        expert_memory: int | None = None,
    ):
        """`factors`: of each expert, as its file in `pair` holds them.

        Raises BundleError for files that are not those of a pair, and as `Loader` and `FactorSlots` do.
        """
        manifest, spec = bundle.manifest, bundle.manifest.models[0]
        device = Device()
        device.enter()
        loader = Loader(bundle, variant, flavour, device)
        engine, self._fusion, self._profile = loader.load(BASE), loader.load(FUSION), loader.profile
        self._shared = shared = Shared.of(device, manifest, loader.profile.tokens)
        check(engine, spec, shared, len(manifest.rows), f"{bundle.folder}", PREFIXES)
        check_fusion(self._fusion, manifest.vocab_size, f"{bundle.folder}")
        for name in manifest.experts:
            if (wrong := unfit(engine, factors[name])) is not None:
                raise BundleError(
                    f"{bundle.folder / pair.factors[name]} does not fit its engine (the input {wrong}); export the bundle again."
                )
        stream = device.stream()
        self._pair = PairEngine(
            engine=engine,
            spec=spec,
            shared=shared,
            stream=stream,
            scratch=device.memory(max(engine.scratch, self._fusion.scratch)),
            head_rows=len(manifest.rows),
            scored=None if manifest.experts == manifest.rows else [manifest.rows.index(name) for name in manifest.experts],
            factors=FactorSlots(device, stream, [factors[name] for name in manifest.experts], expert_memory),
            rows=(new_rows(engine, spec, shared), new_rows(engine, spec, shared)),
            idle=KeysValues(spec, shared, token_bytes(engine, spec)),
            unread=Unread(device, manifest.vocab_size, len(manifest.rows)),
        )
        stream.zero(self._pair.idle.memory)
        self.router = PairModel(self._pair, None)
        self.experts = [PairModel(self._pair, number) for number in range(len(manifest.experts))]
        shared.send_key_positions()

    def __del__(self) -> None:
        # a runtime that is closed unused would free memory that its first uploads still read
        with suppress(Exception):  # it was not built completely, or the driver is shutting down
            self._shared.device.finish()

    def forward_both(self, router: PairCache, own: Segment, expert: PairCache, other: Segment) -> tuple[Any, Any]:
        """See `runtime.backend.Backend.forward_both`."""
        return read_both(router, own, expert, other)

    def fuser(self) -> Fuser:
        """A fuser with buffers of its own."""
        return DeviceFuser(self._fusion, self._shared, self._pair.stream, self._pair.scratch, self._profile)


class PairModel:
    """One of the models: an expert by its number, or the router (None)."""

    def __init__(self, pair: PairEngine, number: int | None):
        self.pair, self.number = pair, number

    def cache(self) -> PairCache:
        """Device buffers of the full capacity."""
        return PairCache(self)


class PairCache(JointCache):
    """One model's KV buffers for one session, in device memory."""

    def __init__(self, model: PairModel):
        super().__init__(model.number is not None)
        self._model, shared = model, model.pair.shared
        shared.device.enter()
        self._done = shared.device.event()  # reached when the buffers are clear, or copied
        self._text = KeysValues(model.pair.spec, shared, token_bytes(model.pair.engine, model.pair.spec))
        with shared.lock:
            model.pair.stream.zero(self._text.memory)  # keys beyond the text are masked, but 0 · NaN is NaN
            model.pair.stream.record(self._done)

    def __del__(self) -> None:
        if hasattr(self, "_text"):
            self._done.wait()

    def bind(self, router: PairCache | None) -> PairPass:
        """See `JointCache.bind`."""
        pair, number = self._model.pair, self._model.number
        if router is not None:
            return PairPass(pair, router._text, self._text, number)
        return PairPass(pair, self._text, None, None) if number is None else PairPass(pair, None, self._text, number)

    def copy_prefix(self, other: PairCache, length: int) -> None:
        """See `runtime.backend.Cache.copy_prefix`. All caches are used on one stream, which keeps the order."""
        shared, stream = self._model.pair.shared, self._model.pair.stream
        with shared.lock:
            shared.device.enter()
            self._text.copy_prefix(stream, other._text, length)
            stream.record(self._done)
            stream.record(other._done)  # its buffers may be freed after that
        self.length = length

    def interrupt(self) -> None:
        """See `runtime.backend.Cache.interrupt`: queued work cannot be stopped."""


def unfit(engine: Engine, factors: Arrays) -> str | None:
    """The first input that an expert's factors do not fit; None: they fit."""
    for name, shape in engine.shapes.items():
        if name.startswith(DELTA):
            given = factors.get(name)
            if given is None or given.shape != shape or given.itemsize != BYTES.get(engine.types[name]):
                return name
    return None
