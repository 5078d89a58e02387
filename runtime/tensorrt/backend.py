"""The TensorRT backend: router, experts and fusion of a bundle as engines on one CUDA device."""

from __future__ import annotations

from contextlib import suppress

from fusionroute.runtime.backend import Fuser
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.manifest import FUSION, Variant
from fusionroute.runtime.tensorrt.device import Device
from fusionroute.runtime.tensorrt.fit import check, check_fusion
from fusionroute.runtime.tensorrt.fusion import DeviceFuser
from fusionroute.runtime.tensorrt.loading import Loader
from fusionroute.runtime.tensorrt.model import Model
from fusionroute.runtime.tensorrt.residency import Residency
from fusionroute.runtime.tensorrt.shared import Scratch, Shared


class TensorRt:
    """All models of one variant. `expert_memory`: bytes of device memory for the weights of experts; None: no limit.

    Router and fusion share the router's stream and scratch memory. The experts share another one, since the router may
    run beside them.
    """

    prefill_chunk = 512  # the largest of the engines' profile: see `profile`
    on_host = False
    model_seconds = None
    async_dispatch = True  # a forward pass is queued, and runs while the host goes on
    guess_limit = 1  # the token that the router reads at the same time
    forward_both = None
    forward_together = None
    expect = None
    apart: frozenset[int] = frozenset()

    def __init__(self, bundle: Bundle, variant: Variant, flavour: str, expert_memory: int | None = None):
        manifest = bundle.manifest
        device = Device()
        device.enter()
        loader = Loader(bundle, variant, flavour, device)
        router_engine, self._fusion = loader.load(manifest.models[0].name), loader.load(FUSION)
        self._profile = loader.profile
        self._shared = shared = Shared.of(device, manifest, loader.profile.tokens)
        self._stream = device.stream()
        main = Scratch(device.memory(max(router_engine.scratch, self._fusion.scratch)), None)
        self._scratch = main.memory
        self.router = Model(router_engine, manifest.models[0], shared, self._stream, main, len(manifest.experts))
        residency = None if expert_memory is None else Residency(device, expert_memory)
        loaded = []
        for spec in manifest.models[1:]:
            engine = loader.load(spec.name)
            weights = engine.weights() if residency else None
            if residency and weights:
                residency.adopt(weights)  # before the next one is loaded, so that the budget always holds
            loaded.append((engine, spec, weights))
        side = Scratch(device.memory(max(engine.scratch for engine, *_ in loaded)), device.event())
        self.experts = [
            Model(engine, spec, shared, device.stream(), side, weights=weights, residency=residency) for engine, spec, weights in loaded
        ]
        for model in (self.router, *self.experts):
            check(model.engine, model.spec, shared, model.experts, f"{bundle.folder}")
        check_fusion(self._fusion, manifest.vocab_size, f"{bundle.folder}")
        shared.send_key_positions()

    def __del__(self) -> None:
        # a runtime that is closed unused would free memory that its first upload still reads
        with suppress(Exception):  # it was not built completely, or the driver is shutting down
            self._shared.device.finish()

    def fuser(self) -> Fuser:
        """A fuser with buffers of its own."""
        return DeviceFuser(self._fusion, self._shared, self._stream, self._scratch, self._profile)
