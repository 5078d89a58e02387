"""Seconds of forward passes on this machine by their number of tokens: measured once a month per bundle, kept in the cache folder."""

import contextlib
import hashlib
import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fusionroute.runtime import files
from fusionroute.runtime.backend import FusionInputs
from fusionroute.runtime.backends import Backend
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.cache import AGES, Clock, prune
from fusionroute.runtime.machine import cores, installed, processor

MAX_ROUND_TOKENS = 8
SIZES = (1, 2, 4, 8)  # tokens in a pass that are measured
LENGTHS = (32, 1024)  # of the text so far: attention takes its share of long ones
REPEATS = 5
PACKAGES = ("fusionroute", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx")

Passes = tuple[tuple[float, ...], tuple[float, ...]]  # seconds for SIZES tokens, with logits at every token, at both LENGTHS


@dataclass(frozen=True)
class Costs:
    """Seconds of forward passes and of one fusion. `beside`: whether router and expert run at the same time in a plain step."""

    router: Passes
    experts: tuple[Passes, ...]
    fusion: float
    beside: bool = False


def seconds_by_tokens(passes: Passes, length: int, exact: bool = False) -> list[float]:
    """Seconds for 0 … MAX_ROUND_TOKENS tokens behind `length` others; `exact`: they are read by twos."""
    far = min(max((length - LENGTHS[0]) / (LENGTHS[1] - LENGTHS[0]), 0.0), 1.0)
    seconds = np.interp(range(1, MAX_ROUND_TOKENS + 1), SIZES, (1 - far) * np.array(passes[0]) + far * np.array(passes[1])).tolist()
    if exact:
        seconds[::2] = seconds[1::2]
    return [0.0, *seconds]


def costs_of(bundle: Bundle, backend: Backend, precision: str, threads: int | None) -> Costs:
    """The costs kept for this bundle, machine and setting, or measured now (a second or two for models of 135 million parameters).

    The first measurement that is kept holds for all later runs, so that a seed gives the same text again. Without a place to keep it, it may not.
    """
    about = [
        bundle.manifest.model_dump_json(), precision, type(backend).__module__, threads or cores(), platform.machine(),
        processor(), {name: installed(name) for name in PACKAGES}, SIZES, LENGTHS, MAX_ROUND_TOKENS,
    ]  # fmt: skip
    path = files.cache_folder() / "costs" / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()}.json"
    if (known := read_costs(path)) is not None:
        return known
    measured = measure(bundle, backend)
    with contextlib.suppress(OSError):  # nowhere to write: measured again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(path, json.dumps(asdict(measured) | {"measured": time.time()}).encode())
        prune()
    return read_costs(path) or measured


def read_costs(path: Path, clock: Clock = time.time) -> Costs | None:
    """The costs in a file; None if it cannot be read or is too old: costs measured on a busy machine must not stay for ever."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, IndexError):
        known = json.loads(path.read_text())
        if clock() - known["measured"] > AGES["costs"]:
            return None
        return Costs(passes(known["router"]), tuple(map(passes, known["experts"])), float(known["fusion"]), bool(known["beside"]))
    return None


def passes(tables: Any) -> Passes:
    """Passes from a pair of lists of seconds. Raises ValueError for other sizes than SIZES."""
    near, far = (tuple(map(float, seconds)) for seconds in tables)
    if not len(near) == len(far) == len(SIZES):
        raise ValueError("other sizes")
    return near, far


def measure(bundle: Bundle, backend: Backend) -> Costs:
    """Time the passes in rounds, so that a disturbance touches all sizes alike; the fastest of each counts. Equal experts are timed once."""
    models, capacity = bundle.manifest.models, bundle.manifest.max_seq_len
    like = {spec.parameters: number for number, spec in enumerate(models[1:], 1)}  # an expert of each size
    caches = {0: backend.router.cache()} | {number: backend.experts[number - 1].cache() for number in like.values()}
    sizes = [min(size, capacity) for size in SIZES]
    lengths = [max(0, min(length, capacity - sizes[-1])) for length in LENGTHS]
    fuse = backend.fuser()
    taken: dict[Any, list[float]] = {}
    for _ in range(REPEATS + 1):
        for who, cache in caches.items():
            for at, length in enumerate(lengths):
                for size in sizes:
                    cache.length = length  # of zeros: what they hold costs nothing
                    start = time.perf_counter()
                    answer = cache.forward([0] * size, range(size))
                    if size > 1 or not backend.async_dispatch:
                        np.asarray(answer.logits)
                    _ = answer.routing  # waits for the router
                    taken.setdefault((who, at, size), []).append(time.perf_counter() - start)
        for cache in caches.values():
            cache.length = 0
        rows = [cache.forward([0], [0]).logits for cache in list(caches.values())[:2]]
        start = time.perf_counter()
        _ = fuse(FusionInputs(rows[0], rows[-1], (0.5, 0.5))).ids
        taken.setdefault("fusion", []).append(time.perf_counter() - start)
    fastest = {what: min(seconds[1:]) for what, seconds in taken.items()}  # the first round warms up
    timed = {who: tuple(tuple(fastest[who, at, size] for size in sizes) for at in range(len(lengths))) for who in caches}
    experts = tuple(passes(timed[like[spec.parameters]]) for spec in models[1:])
    return Costs(passes(timed[0]), experts, fastest["fusion"], backend.async_dispatch)
