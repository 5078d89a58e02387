"""What one forward pass costs on this machine by its number of tokens: measured once per bundle and kept in the user's cache folder."""

import contextlib
import hashlib
import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime import files
from runtime.backends import Backend
from runtime.bundle import Bundle

MOST = 8  # tokens that one round produces at most
SIZES = (1, 2, 4, 8)  # tokens at a time that are measured
CONTEXT, REPEATS = 32, 5


@dataclass(frozen=True)
class Costs:
    """Seconds of a forward pass of the router and of the largest expert for SIZES tokens, all rows of logits wanted, and of one fusion."""

    router: tuple[float, ...]
    expert: tuple[float, ...]
    fusion: float

    def of_router(self, tokens: int) -> float:
        """Seconds for 1 … MOST tokens."""
        return float(np.interp(tokens, SIZES, self.router))

    def of_expert(self, tokens: int) -> float:
        """Seconds for 1 … MOST tokens."""
        return float(np.interp(tokens, SIZES, self.expert))


def costs_of(bundle: Bundle, backend: Backend, precision: str, device: str, threads: int | None) -> Costs:
    """The costs kept for this bundle, machine and setting, or measured now (a second for a model of 135 million parameters)."""
    about = [
        bundle.manifest.model_dump_json(), precision, device, threads, platform.machine(), platform.processor(), processor(), len(SIZES), MOST,
    ]  # fmt: skip
    path = files.cache_folder() / "costs" / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        known = json.loads(path.read_text())
        return Costs(tuple(map(float, known["router"])), tuple(map(float, known["expert"])), float(known["fusion"]))
    found = measure(bundle, backend)
    with contextlib.suppress(OSError):  # nowhere to write: measured again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(path, json.dumps(asdict(found)).encode())
    return found


def measure(bundle: Bundle, backend: Backend) -> Costs:
    """Time the passes one after the other in rounds, so that a disturbance touches all sizes alike; medians."""
    models = bundle.manifest.models
    largest = max(range(1, len(models)), key=lambda number: models[number].parameters) - 1
    caches = [backend.router.cache(), backend.experts[largest].cache()]
    sizes = [min(size, bundle.manifest.max_seq_len - 1) for size in SIZES]
    context = min(CONTEXT, bundle.manifest.max_seq_len - sizes[-1])
    fuse = backend.fuser()
    none = np.zeros(0, np.int64)
    taken: dict[Any, list[float]] = {}
    for cache in caches:
        cache.forward([0] * context, [context - 1])
    for _ in range(REPEATS + 1):
        for who, cache in enumerate(caches):
            for size in sizes:
                start = time.perf_counter()
                answer = cache.forward([0] * size, range(size))
                np.asarray(answer.logits)
                taken.setdefault((who, size), []).append(time.perf_counter() - start)
                cache.length = context
        rows = [cache.forward([0], [0]).logits for cache in caches]
        for cache in caches:
            cache.length = context
        start = time.perf_counter()
        _ = fuse(rows[0], rows[1], (0.5, 0.5), 1, none, 1.0, 1.0).ids
        taken.setdefault("fusion", []).append(time.perf_counter() - start)
    medians = {what: float(np.median(seconds[1:])) for what, seconds in taken.items()}  # the first round warms up
    router, expert = (tuple(medians[who, size] for size in sizes) for who in range(2))
    return Costs(router, expert, medians["fusion"])


def processor() -> str:
    """The processor's name where the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Hardware")):
                return line
    return ""
