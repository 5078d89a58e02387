"""What all caches on the CPU do with their keys and values, whatever passes write them."""

from __future__ import annotations

from typing import Any

import numpy as np

from fusionroute.runtime.backends.keys_values import KeysValues


class HostMemory:
    """Keys and values in the host's memory. options: of the runs that write them."""

    length: int
    memory: KeysValues
    options: Any

    def copy_prefix(self, other: HostMemory, length: int) -> None:
        """See `runtime.backend.Cache.copy_prefix`."""
        self.memory.copy(other.memory, length)
        self.length = length

    def keys_values(self, length: int) -> np.ndarray:
        """See `runtime.backend.HostCache.keys_values`."""
        return self.memory.view(length)

    def interrupt(self) -> None:
        """See `runtime.backend.Cache.interrupt`. ONNX Runtime checks between two operators."""
        self.options.terminate = True
