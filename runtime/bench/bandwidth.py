"""How fast the machine reads memory: the ceiling of decoding, which reads all weights for every token."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fusionroute.runtime.bench.memory import available
from fusionroute.runtime.machine import cores
from fusionroute.runtime.tensorrt.device import Device

SMALLEST, CACHES = 256 << 20, 8  # least size of the buffer: bytes, and multiples of the last-level cache
TRIES = 5
KERNELS: tuple[Callable[[np.ndarray], Any], ...] = (  # the fastest of them differs between processors
    lambda part: np.dot(part, part),
    lambda part: part.view(np.int8).min(),
)


class Bandwidth(NamedTuple):
    """Bytes per second, best of several, and the size of the buffer that was read."""

    bytes_per_second: float
    buffer: int


def of_host() -> Bandwidth:
    """Every core reads its share of one large buffer."""
    threads = cores()
    size = min(max(SMALLEST, CACHES * last_level_cache()), max(available() // 4, 1 << 20))
    buffer = np.ones(size // 4, np.float32)  # written: unwritten pages would all be one page of zeros
    parts = np.array_split(buffer, threads)
    with ThreadPoolExecutor(threads) as pool:
        best = min(seconds(partial(sweep, pool, kernel, parts)) for kernel in KERNELS)
    return Bandwidth(buffer.nbytes / best, buffer.nbytes)


def sweep(pool: ThreadPoolExecutor, kernel: Callable[[np.ndarray], Any], parts: Sequence[np.ndarray]) -> None:
    """Read all parts at once."""
    list(pool.map(kernel, parts))


def of_device(device: Device) -> Bandwidth:
    """Copies within the device's memory, which read and write every byte once."""
    size = min(SMALLEST, device.free_memory() // 8)
    source, target, stream, done = device.memory(size), device.memory(size), device.stream(), device.event()
    stream.zero(source)

    def copies() -> None:
        for _ in range(TRIES):
            stream.copy(target.address, source.address, size)
        stream.record(done)
        done.wait()

    return Bandwidth(2 * TRIES * size / seconds(copies), size)


def seconds(work: Callable[[], Any]) -> float:
    """The shortest of TRIES runs of `work`, after one that warms up."""
    work()
    durations = []
    for _ in range(TRIES):
        start = time.perf_counter()
        work()
        durations.append(time.perf_counter() - start)
    return min(durations)


def last_level_cache() -> int:
    """Bytes of the largest cache of the first core; 0 where the system does not tell."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        number, unit = text.rstrip("KMG"), text[-1:]
        if number.isdigit():
            sizes.append(int(number) << {"K": 10, "M": 20, "G": 30}.get(unit, 0))
    return max(sizes)
