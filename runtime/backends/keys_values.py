"""One model's keys and values in the host's memory, bound by address: they are updated in place."""

from __future__ import annotations

import math
import mmap
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fusionroute.runtime.backends.signature import FLOATS, CacheValue
from fusionroute.runtime.errors import FusionError, UnavailableError, one_line

if TYPE_CHECKING:
    from fusionroute.runtime.manifest import Model, Variant


class Storage(NamedTuple):
    """How a cache holds its values: as graphs declare it, and as numpy does."""

    declared: CacheValue
    dtype: type[np.generic]


STORAGE = {
    "fp32": Storage(FLOATS, np.float32),
    "int8": Storage(CacheValue(("tensor(int8)",)), np.int8),
    "int4": Storage(CacheValue(("tensor(uint8)",), packed=2), np.uint8),
}


def storage_of(variant: Variant) -> Storage:
    """How the caches of a variant hold their values. Raises UnavailableError for a precision that this backend lacks."""
    name = variant.kv or "fp32"
    if name not in STORAGE:
        raise UnavailableError(
            f"ONNX Runtime keeps no keys and values in {name} on a CPU: load another precision, or export with --kv "
            f"{', '.join(list(STORAGE)[:-1])} or {list(STORAGE)[-1]}."
        )
    return STORAGE[name]


class KeysValues:
    """KV buffers [1, kv_heads, capacity, head_size] per layer, and the inputs that tell how many tokens they hold.

    A buffer whose storage packs values is as much narrower.
    """

    def __init__(self, spec: Model, capacity: int, storage: Storage):
        self.shape = (1, spec.kv_heads, capacity, spec.head_size // storage.declared.packed)
        self._dtype = storage.dtype
        self.buffers = zeros((2 * spec.layers, *self.shape), storage.dtype)
        self.names = [f"{layer}.{kind}" for layer in range(spec.layers) for kind in ("key", "value")]
        self.last, self.total = np.zeros(1, np.int32), np.zeros((), np.int32)

    def bind(self, binding: Any, prefix: str = "") -> None:
        """Bind as both past and present of the model whose inputs begin with `prefix`."""
        for name, buffer in zip(self.names, self.buffers, strict=True):
            binding.bind_input(f"{prefix}past.{name}", "cpu", 0, self._dtype, self.shape, buffer.ctypes.data)
            binding.bind_output(f"{prefix}present.{name}", "cpu", 0, self._dtype, self.shape, buffer.ctypes.data)
        binding.bind_input(f"{prefix}seqlens_k", "cpu", 0, np.int32, (1,), self.last.ctypes.data)
        binding.bind_input(f"{prefix}total_sequence_length", "cpu", 0, np.int32, (), self.total.ctypes.data)

    def set_total(self, total: int) -> None:
        """How many tokens the buffers hold at the end of the next pass."""
        self.last[0], self.total[()] = total - 1, total

    def view(self, length: int) -> np.ndarray:
        """See `runtime.backend.HostCache.keys_values`."""
        return self.buffers[:, 0, :, :length]

    def copy(self, other: KeysValues, length: int) -> None:
        """Take over the first `length` tokens of the same model's buffers."""
        self.buffers[..., :length, :] = other.buffers[..., :length, :]


def zeros(shape: tuple[int, ...], dtype: type[np.generic] = np.float32) -> np.ndarray:
    """Zeros, mapped page by page as they are written.

    NumPy asks for huge pages: a few tokens of each head would take many of them. Raises FusionError for more than fit.
    """
    if not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return np.zeros(shape, dtype)
    size = np.dtype(dtype).itemsize * math.prod(shape)
    try:
        region = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError) as error:
        raise FusionError(
            f"Keys and values need {size / 1e9:,.1f} GB of address space, which this process has not ({one_line(error)}): free memory, "
            "or export with a smaller --max-seq-len."
        ) from error
    with suppress(OSError):  # a kernel without huge pages
        region.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(region, dtype).reshape(shape)
