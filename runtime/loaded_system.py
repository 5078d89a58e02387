"""A system on a device: its models until they are closed, and what all sessions of a runtime share."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from copy import copy

from fusionroute.runtime.backends import Backend, open_backend
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.errors import ClosedError
from fusionroute.runtime.exclusive import FORKED
from fusionroute.runtime.kv_memory import KvMemory
from fusionroute.runtime.options import RuntimeOptions
from fusionroute.runtime.prefix import PrefixCache


class LoadedSystem:
    """The loaded models of a bundle. `close` releases them for everybody who holds this object."""

    def __init__(self, bundle: Bundle, options: RuntimeOptions):
        """Raises FusionError subclasses only: BundleError, UnavailableError, InputError."""
        manifest = bundle.manifest
        self._backend: Backend | None
        self._backend, self.variant = open_backend(bundle, options)
        self.precision = self.variant.precision
        self.device = options.device if options.device != "auto" else f"auto ({type(self._backend).__name__})"
        self._process = os.getpid()
        self.router_name: str = manifest.models[0].name
        self.expert_names: list[str] = manifest.experts
        self.bundle = bundle
        self.exchanged: frozenset[str] = frozenset()  # experts that are others than the bundle's
        self.kv_memory = KvMemory(options.kv_memory)
        self.vocab_size, self.max_seq_len = manifest.vocab_size, manifest.max_seq_len
        self.exact = options.exact
        self.router_may_answer = options.on_expert_failure == "router_only"
        self.background_prefill = options.catch_up == "background"
        threaded = self.background_prefill and not self._backend.async_dispatch
        self.thread = ThreadPoolExecutor(1, "fusionroute-prefill") if threaded else None  # starts with its first work
        models = (None, *range(len(self.expert_names)))
        # keys: None for the router, else the expert's number; without a prefix cache: None
        self.prefixes = {model: PrefixCache() for model in models} if options.prefix_cache else None

    def with_experts(self, backend: Backend, names: list[str], changed: str) -> LoadedSystem:
        """This system with other experts, which shares all else with it. `changed`: the one that was added or removed.

        What the router and the other experts have read of prompts is lent across the two.
        """
        other = copy(self)
        other._backend, other.expert_names = backend, names
        other.exchanged = self.exchanged | {changed}
        if self.prefixes is not None:
            prefixes = {name: self.prefixes[number] for number, name in enumerate(self.expert_names) if name != changed}
            experts = {number: prefixes[name] if name in prefixes else PrefixCache() for number, name in enumerate(names)}
            other.prefixes = {None: self.prefixes[None], **experts}
        return other

    def kv_bytes(self, expert: int | None, length: int) -> int:
        """What a cache of the router (None) or of an expert takes for `length` tokens, as `Variant.kv_bytes_per_token` counts."""
        name = self.router_name if expert is None else self.expert_names[expert]
        models = self.bundle.manifest.models
        spec = next((model for model in models if model.name == name), models[0])  # an expert that was added: one size for all
        return self.variant.kv_bytes_per_token(spec) * (length if self.backend.on_host else self.max_seq_len)

    @property
    def backend(self) -> Backend:
        """The loaded models. Raises ClosedError after `close`, and in another process than the one that loaded them."""
        self.check_process()
        backend = self._backend
        if backend is None:
            raise ClosedError("The runtime was closed: load the bundle again.")
        return backend

    def check_process(self) -> None:
        """Raise ClosedError in another process than the one that loaded the models."""
        if self.forked:
            raise ClosedError(FORKED)

    @property
    def forked(self) -> bool:
        """Whether this is a forked process: its locks may be held by threads of the process that loaded the models."""
        return os.getpid() != self._process

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._backend is None

    def close(self) -> None:
        """Release the models; background passes that have not begun are dropped."""
        self._backend = None
        if self.thread is not None:
            self.thread.shutdown(wait=False, cancel_futures=True)
