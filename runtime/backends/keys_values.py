"""One model's keys and values in the host's memory, bound by address: they are updated in place."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fusionroute.runtime.backends.signature import FLOATS, CacheValue
from fusionroute.runtime.errors import FusionError, UnavailableError, one_line
from fusionroute.runtime.limits import WINDOW
from fusionroute.runtime.machine import second_level_cache

if TYPE_CHECKING:
    from fusionroute.runtime.manifest import Model, Variant
    from fusionroute.runtime.window import Window


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


class Lengths:
    """The inputs that tell attention how many tokens its buffers hold at the end of a pass."""

    def __init__(self) -> None:
        self._last, self._total = np.zeros(1, np.int32), np.zeros((), np.int32)

    def bind(self, binding: Any, prefix: str) -> None:
        """To the inputs whose names begin with `prefix`."""
        binding.bind_input(f"{prefix}seqlens_k", "cpu", 0, np.int32, (1,), self._last.ctypes.data)
        binding.bind_input(f"{prefix}total_sequence_length", "cpu", 0, np.int32, (), self._total.ctypes.data)

    def set(self, total: int) -> None:
        """For the next pass."""
        self._last[0], self._total[()] = total - 1, total


def view_step(head_size: int) -> int:
    """Where views of a cache may begin: at multiples of so many tokens.

    ONNX Runtime reads keys in blocks that depend on the processor's second-level cache, and its products sum up to 128
    values at a time. A view that begins with a block has the same sums as the whole, bit for bit: so an answer does not
    depend on the passes that read the text
    (https://github.com/microsoft/onnxruntime/blob/main/onnxruntime/contrib_ops/cpu/bert/multihead_attention.cc,
    MLAS_SGEMM_STRIDEK in core/mlas/lib/mlasi.h).
    """
    block = max(second_level_cache() // (4 * 4 * 2 * head_size), 1)
    return math.lcm(block, 128)


class KeysValues:
    """KV buffers [1, kv_heads, capacity, head_size] per layer, and the inputs that tell how many tokens they hold.

    A buffer whose storage packs values is as much narrower. Layers with a sliding window are given the end of the text
    alone: their buffers are bound from a token on that lies before all that the next pass sees, at the same distance
    from head to head. So what is bound ends behind a buffer, by as many tokens as it begins later; nobody reads there.
    """

    def __init__(self, spec: Model, capacity: int, storage: Storage, window: Window | None = None):
        self.shape = (1, spec.kv_heads, capacity, spec.head_size // storage.declared.packed)
        self._dtype, self._window = storage.dtype, window
        spare = 0 if window is None else 1  # address space behind the last buffer
        self._with_spare = zeros((2 * spec.layers + spare, *self.shape), storage.dtype)
        self.buffers = self._with_spare[: 2 * spec.layers]
        self.names = [f"{layer}.{kind}" for layer in range(spec.layers) for kind in ("key", "value")]
        self._lengths, self._seen = Lengths(), Lengths()
        self._start, self._step = 0, view_step(spec.head_size)  # the first token that layers with a window are given
        self._binding: Any = None

    def bind(self, binding: Any, prefix: str = "") -> None:
        """Bind as both past and present of the model whose inputs begin with `prefix`."""
        self._bind_buffers(binding, prefix, range(len(self.names)), 0)
        self._lengths.bind(binding, prefix)
        if self._window is not None:
            self._seen.bind(binding, f"{prefix}{WINDOW}")
            self._binding, self._start = binding, 0

    def _bind_buffers(self, binding: Any, prefix: str, numbers: Iterable[int], start: int) -> None:
        """From a token on."""
        for number in numbers:
            name, address = self.names[number], self.buffers[number, 0, 0, start:].ctypes.data
            binding.bind_input(f"{prefix}past.{name}", "cpu", 0, self._dtype, self.shape, address)
            binding.bind_output(f"{prefix}present.{name}", "cpu", 0, self._dtype, self.shape, address)

    def begin_pass(self, length: int, count: int) -> None:
        """The next pass reads `count` tokens behind `length`."""
        self._lengths.set(length + count)
        if self._window is not None:
            start = max(length - self._window.tokens, 0) // self._step * self._step
            if start != self._start:
                self._start = -1  # until all are bound
                layers = self._window.layers
                self._bind_buffers(self._binding, "", (2 * layer + kind for layer in layers for kind in (0, 1)), start)
                self._start = start
            self._seen.set(length + count - start)

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
