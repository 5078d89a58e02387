"""Seconds of a forward pass by its number of tokens: measured per bundle, kept in the cache folder for 30 days."""

import contextlib
import logging
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fusionroute.runtime import files
from fusionroute.runtime.backend import Cache, FusionInputs, Segment
from fusionroute.runtime.backends import Backend
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.cache import DAY, Clock, prune, read_checked, sha256, write_checked
from fusionroute.runtime.errors import one_line
from fusionroute.runtime.limits import MAX_ROUND_TOKENS
from fusionroute.runtime.machine import cores, installed, processor

LOG = logging.getLogger("fusionroute")
SIZES = (1, 2, 4, 8)  # tokens in a pass that are measured
LENGTHS = (32, 1024)  # tokens of the text so far: attention costs more behind a long one
REPEATS = 5
VALID = 30 * DAY  # seconds after which costs are measured again, however often they were used
PACKAGES = ("fusionroute", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx")

Passes = tuple[tuple[float, ...], tuple[float, ...]]  # seconds by SIZES, at both LENGTHS, with logits at every token


@dataclass(frozen=True)
class Costs:
    """Seconds of forward passes and of one fusion.

    `concurrent`: router and expert run at the same time in a plain step. `joint`: where both read in one pass, of as
    many tokens each, and of one token of the router and several of the expert.
    """

    router: Passes
    experts: tuple[Passes, ...]
    fusion: float
    concurrent: bool = False
    joint: tuple[Passes, Passes] | None = None


def seconds_by_tokens(passes: Passes, length: int, exact: bool = False) -> list[float]:
    """Seconds for 0 … MAX_ROUND_TOKENS tokens behind `length` others; `exact`: they are read by twos."""
    far = min(max((length - LENGTHS[0]) / (LENGTHS[1] - LENGTHS[0]), 0.0), 1.0)
    seconds = np.interp(range(1, MAX_ROUND_TOKENS + 1), SIZES, (1 - far) * np.array(passes[0]) + far * np.array(passes[1])).tolist()
    if exact:
        seconds[::2] = seconds[1::2]
    return [0.0, *seconds]


def costs_of(bundle: Bundle, backend: Backend, precision: str, threads: int | None) -> Costs:
    """Costs from the cache folder for this bundle, machine and setting, else measured: 1–2 s for 135 M parameters.

    A measurement is used for 30 days. While it is, a seed gives the same text again; where the cache folder cannot be
    written, it may not.
    """
    path = costs_file(bundle, backend, precision, threads, (SIZES, LENGTHS, MAX_ROUND_TOKENS))
    if path is None:
        return measure(bundle, backend)
    if (known := read_costs(path, len(bundle.manifest.experts))) is not None:
        return known
    measured = measure(bundle, backend)
    keep(path, asdict(measured))
    return read_costs(path, len(bundle.manifest.experts)) or measured


def costs_file(bundle: Bundle, backend: Backend, precision: str, threads: int | None, what: tuple[Any, ...]) -> Path | None:
    """Where a measurement of this bundle, machine and setting is kept; None where the cache folder cannot be written."""
    setting = [
        bundle.manifest.model_dump_json(), precision, type(backend).__module__, threads or cores(), platform.machine(),
        processor(), {name: installed(name) for name in PACKAGES}, *what,
    ]  # fmt: skip
    try:
        return files.private_folder("costs") / f"{sha256(setting)}.json"
    except OSError as error:
        LOG.warning("Costs are measured at each load (%s).", one_line(error))
        return None


def keep(path: Path, measured: dict[str, Any]) -> None:
    """Write a measurement, with the time. Where there is no place to write it is made again next time."""
    with contextlib.suppress(OSError):
        write_checked(path, measured | {"measured": time.time()})
        prune()


def read_costs(path: Path, experts: int, clock: Clock = time.time) -> Costs | None:
    """The costs in a file; None if it holds none of so many experts, or is too old: a busy machine may have measured them."""
    with contextlib.suppress(ValueError, TypeError, KeyError, IndexError, OverflowError):
        known = read_checked(path)
        if clock() - known["measured"] > VALID or len(known["experts"]) != experts:
            return None
        joint = known["joint"] and (passes(known["joint"][0]), passes(known["joint"][1]))
        each = tuple(map(passes, known["experts"]))
        return Costs(passes(known["router"]), each, float(known["fusion"]), bool(known["concurrent"]), joint)
    return None


def passes(tables: Any) -> Passes:
    """Passes from a pair of lists of seconds. Raises ValueError for other sizes than SIZES."""
    near, far = (tuple(map(float, seconds)) for seconds in tables)
    if not len(near) == len(far) == len(SIZES):
        raise ValueError("other sizes")
    return near, far


def measure(bundle: Bundle, backend: Backend) -> Costs:
    """Time all passes in rounds, so that a disturbance affects all sizes alike; the fastest of each counts.

    Equal experts are timed once.
    """
    models, capacity = bundle.manifest.models, bundle.manifest.max_seq_len
    kinds = [(spec.parameters, number in backend.apart) for number, spec in enumerate(models[1:])]
    first = {kind: kinds.index(kind) + 1 for kind in kinds}  # an expert of each kind
    caches = {0: backend.router.cache()} | {number: backend.experts[number - 1].cache() for number in first.values()}
    sizes = [min(size, capacity) for size in SIZES]
    lengths = [max(0, min(length, capacity - sizes[-1])) for length in LENGTHS]
    fuse = backend.fuser()

    def alone(cache: Cache, size: int) -> None:
        output = cache.forward([0] * size, range(size))
        if size > 1 or not backend.async_dispatch:
            np.asarray(output.logits)
        _ = output.routing  # waits for the router

    work: dict[Any, Callable[[int], Any]] = {model: partial(alone, cache) for model, cache in caches.items()}
    if (forward_both := backend.forward_both) is not None:
        router, expert = caches[0], next(caches[number] for number in first.values() if number - 1 not in backend.apart)
        work["reading"] = lambda size: forward_both(router, segment(size), expert, segment(size))
        work["verifying"] = lambda size: forward_both(router, segment(1), expert, segment(size))
    seconds: dict[Any, list[float]] = {}
    for _ in range(REPEATS + 1):
        for name, run in work.items():
            for place, length in enumerate(lengths):
                for size in sizes:
                    for cache in caches.values():
                        cache.length = length  # the keys and values there do not affect the time
                    start = time.perf_counter()
                    run(size)
                    seconds.setdefault((name, place, size), []).append(time.perf_counter() - start)
        for cache in caches.values():
            cache.length = 0
        rows = [cache.forward([0], [0]).logits for cache in list(caches.values())[:2]]
        start = time.perf_counter()
        _ = fuse(FusionInputs(rows[0], rows[-1], (0.5, 0.5))).ids
        seconds.setdefault("fusion", []).append(time.perf_counter() - start)
    fastest = {key: min(times[1:]) for key, times in seconds.items()}  # the first round warms up
    tables = {name: passes([[fastest[name, place, size] for size in sizes] for place in range(len(lengths))]) for name in work}
    experts = tuple(tables[first[kind]] for kind in kinds)
    joint = (tables["reading"], tables["verifying"]) if "reading" in tables else None
    return Costs(tables[0], experts, fastest["fusion"], backend.async_dispatch, joint)


def segment(size: int) -> Segment:
    """So many tokens, answered at each."""
    return Segment([0] * size, range(size))
