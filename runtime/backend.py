"""What a backend offers: models that read tokens into a KV cache, and the fusion of two models' logits."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

REUSED = 16  # most rows of logits that a cache returns in buffers that it uses again


class Segment(NamedTuple):
    """What one model reads in a pass: S token ids, and K of their positions (0 … S−1, ascending) that it answers at."""

    ids: Sequence[int]
    positions: Sequence[int]


class Output(NamedTuple):
    """One forward pass. `logits` [K, V] stays where the backend computed it, or is what the backend's fuser makes it of:
    NumPy can read it as an array. `routing` is float32 [K, n_experts] for a router, else None.

    With K ≤ REUSED the next pass through the same cache overwrites both; with more they are arrays for the caller.
    """

    logits: Any
    routing: np.ndarray | None


def room_for(logits: Any, count: int, vocab: int) -> Any:
    """Room for `count` rows such as an output has, which later passes do not overwrite."""
    return logits.room(count) if hasattr(logits, "room") else np.empty((count, vocab), np.float32)


NO_IDS = np.zeros(0, np.int64)


class FusionInputs(NamedTuple):
    """What one fusion reads: logits of K positions, float32 [K, V], where the models left them or on the host.

    coefficients: weights of the router's and the expert's logits. k: how many candidates are returned for each
    position. penalty_ids: int64 [P], the token ids that the repetition penalty touches at each position. temperature:
    of `sampling_normaliser`.
    """

    router: Any
    expert: Any
    coefficients: tuple[float, float]
    k: int = 1
    penalty_ids: np.ndarray = NO_IDS
    penalty: float = 1.0
    temperature: float = 1.0


class Fused(NamedTuple):
    """What fusion returns for K positions, in the backend's buffers: read or copy them before the next call.

    ids int64 [K, k] and logits float32 [K, k] after the penalty, sorted; unpenalised float32 [K, k]; log_normaliser
    float32 [K] of the fused logits at temperature 1; sampling_normaliser float32 [K] of the penalised logits at the
    temperature; rows float32 [K, V].
    """

    ids: np.ndarray
    logits: np.ndarray
    unpenalised: np.ndarray
    log_normaliser: np.ndarray
    sampling_normaliser: np.ndarray
    rows: np.ndarray


class Cache(Protocol):
    """One model's KV cache for one session: a buffer of fixed capacity and the number of tokens it holds."""

    length: int

    def forward(self, ids: Sequence[int], positions: Sequence[int]) -> Output:
        """Append S tokens and return outputs for K of their positions (0 … S−1, counted within `ids`, ascending).

        Raises FusionError where the device fails, Interrupted after `interrupt`.
        """
        ...

    def copy_prefix(self, other: Any, length: int) -> None:
        """Take over the first `length` tokens of another cache of the same model, where the backend can copy them.

        The other cache must keep these tokens meanwhile; it may append others.
        """
        ...

    def interrupt(self) -> None:
        """Called from another thread: end the running pass early with Interrupted, and leave the cache as it was.

        Work queued on a device cannot be stopped: backends that queue do nothing.
        """
        ...


class HostCache(Cache, Protocol):
    """A cache in the host's memory."""

    def keys_values(self, length: int) -> np.ndarray:
        """Keys and values of the first `length` tokens, to read or to fill: [2 · layers, kv_heads, length, values of a head].

        A view: each head's part is contiguous.
        """
        ...


# (router's cache, its segment, expert's cache, its segment) → the outputs of both; otherwise as `Cache.forward`
JointForward = Callable[[Any, Segment, Any, Segment], tuple[Output, Output]]
# (caches of the router or of experts, and their segments, in the order of the routing head's rows) → their outputs
ForwardTogether = Callable[[Sequence[tuple[Any, Segment]]], list[Output]]


class LanguageModel(Protocol):
    """A loaded model. Every session has a cache of its own, which one thread uses at a time."""

    def cache(self) -> Cache:
        """A new empty cache of the full context."""
        ...


class Fuser(Protocol):
    """The fusion graph, bound for one session. A backend whose outputs hold something else in place of logits makes
    logits of it here.
    """

    def __call__(self, inputs: FusionInputs) -> Fused:
        """Fuse the logits of K positions. Raises FusionError where the device fails."""
        ...

    def row(self, fused: Fused) -> np.ndarray:
        """The fused logits of the last fusion, of one position, float32 [V]: an array for the caller, which later
        fusions do not change.
        """
        ...

    def ahead(self, router: Any, expert: Any, coefficients: tuple[float, float]) -> tuple[Any, Any, tuple[float, float]]:
        """What to fuse in place of logits [K, V] and their coefficients, where K rows will be fused one by one.

        Here a backend does what costs less for all rows at once. The next call overwrites them.
        """
        return router, expert, coefficients

    def logits(self, rows: Any) -> np.ndarray:
        """The logits [K, V] of an output as an array on the host, float32. The next use of the fuser may overwrite it."""
        return np.asarray(rows)


class BackendOptions(Protocol):
    """What `open_backend` reads of the options of a runtime; see `FusionRuntime.load` for their meaning."""

    @property
    def precision(self) -> str | None:
        """None: the fastest that the bundle has."""
        ...

    @property
    def device(self) -> str:
        """A key of DEVICES, or `auto`."""
        ...

    @property
    def threads(self) -> int | None:
        """Of the CPU; None: one for each core."""
        ...

    @property
    def expert_memory(self) -> int | None:
        """Bytes for experts' weights, where the models run; None: no limit."""
        ...

    @property
    def share_weights(self) -> bool:
        """Whether processes share the weights in host memory."""
        ...

    @property
    def exact(self) -> bool:
        """Whether results must not depend on how many rows are computed at once."""
        ...


class Backend(Protocol):
    """Router, experts and fusion of one variant of a bundle on one device."""

    prefill_chunk: int
    """Preferred number of tokens per prefill pass."""

    async_dispatch: bool
    """Whether `forward` and the fuser only queue their work; reading what they return then waits for it."""

    guess_limit: int
    """Most tokens that an expert should read before it is known whether it answers. 0: it is never guessed."""

    on_host: bool
    """Whether keys and values lie in the host's memory, and take it as they are written: its caches are `HostCache`s then.
    Else they take a device's memory, for the full context from the beginning.
    """

    apart: frozenset[int]
    """Experts that never read in a pass of the router's, nor before it is known that they answer."""

    @property
    def expect(self) -> Callable[[int], None] | None:
        """Told the number of the expert that will probably answer next, before it is known: its weights may come meanwhile.
        None: they are always there, or nothing else can run beside it.
        """
        ...

    @property
    def forward_both(self) -> JointForward | None:
        """One pass in which the router and an expert read, each its own segment; `interrupt` of the router's cache ends
        it. None: every model has passes of its own.
        """
        ...

    @property
    def forward_together(self) -> ForwardTogether | None:
        """One pass in which the router and any experts read, each its own segment; `interrupt` of the first one's cache
        ends it. None: no more than one expert reads beside the router.
        """
        ...

    @property
    def router(self) -> LanguageModel:
        """The router, whose outputs carry routing scores."""
        ...

    @property
    def experts(self) -> Sequence[LanguageModel]:
        """The experts in the order of the routing head's rows."""
        ...

    @property
    def model_seconds(self) -> float | None:
        """What runs of its models have taken so far; None where they run on a device, beside the host."""
        ...

    def fuser(self) -> Fuser:
        """A fuser for one session."""
        ...


Arrays = Mapping[str, np.ndarray]  # an expert's inputs of the graph, float32, by name


@runtime_checkable
class SharedBase(Protocol):
    """A backend whose experts are factors over one base."""

    target: str
    """That of its variant, such as `ort:cpu`."""

    factors: Mapping[str, Arrays]
    """Of its experts, by their names."""

    def with_experts(self, factors: Mapping[str, Arrays]) -> "SharedBackend":
        """A backend of the same loaded base with other experts, by their names.

        Experts stand in the order of the routing head's rows, and rows without one are not scored. This backend and
        the caches of its models stay as they are.
        """
        ...


class SharedBackend(Backend, SharedBase, Protocol):
    """A backend that `SharedBase.with_experts` gives."""
