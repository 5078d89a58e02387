"""What a forward pass returns: rows on the device that may still be computed, or arrays on the host."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np

from fusionroute.runtime.tensorrt.device import Event, Stream
from fusionroute.runtime.tensorrt.shared import Shared
from fusionroute.runtime.tensorrt.transfers import Block


class Pass(Protocol):
    """Whose last forward pass answers."""

    shared: Shared
    stream: Stream
    done: Event
    """Reached when the last forward pass is over."""
    read: Event
    """Reached when the last fusion has read the logits."""


class Rows:
    """Logits on the device, float32 [1, V]. Reading them waits for them and copies them to the host."""

    def __init__(self, source: Pass, block: Block):
        self.block = block
        self.ready, self.read, self.stream = source.done, source.read, source.stream
        self._transfers = source.shared.transfers
        self._lock = source.shared.lock

    def __len__(self) -> int:
        return 1

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        with self._lock:
            self._transfers.download(self.block, self.ready)
        self._transfers.settle(self.block)
        (logits,) = self.block.arrays.values()
        return np.array(logits, dtype)

    def __getitem__(self, key: Any) -> Any:
        return self.__array__()[key]


class Answer:
    """One forward pass, perhaps still under way (see `runtime.backend.Output`). `routing` waits for it."""

    def __init__(self, source: Pass, logits: Block, routing: Block | None, scored: list[int] | None = None):
        """`scored`: of the routing head's rows those that have an expert; None: all."""
        self.logits = Rows(source, logits)
        self._routing, self._scored, self._arrived = routing, scored, False
        self._source = source

    @property
    def routing(self) -> np.ndarray | None:
        """Routing scores, float32 [1, n_experts], valid until the next forward pass; None for an expert."""
        if self._routing is None:
            return None
        if not self._arrived:
            shared = self._source.shared
            with shared.lock:
                shared.transfers.download(self._routing, self._source.done)
            shared.transfers.settle(self._routing)
            self._arrived = True
        scores = self._routing.arrays["routing"]
        return scores if self._scored is None else scores[:, self._scored]


class Known(NamedTuple):
    """One forward pass whose rows are on the host already: float32 [K, V] and [K, n_experts]."""

    logits: np.ndarray
    routing: np.ndarray | None
