"""What passes of several models cost on this machine: measured per bundle, kept in the cache folder for 30 days."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from fusionroute.runtime.backends import Backend
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.cache import Clock, read_checked
from fusionroute.runtime.read_along import PassPrices
from fusionroute.runtime.speculation.costs import REPEATS, VALID, costs_file, keep, segment

LENGTH = 128  # tokens of the text so far


def prices_of(bundle: Bundle, backend: Backend, precision: str, threads: int | None, exact: bool) -> PassPrices | None:
    """Prices from the cache folder, else measured: 18 passes. None where no more than one expert reads beside the router.

    exact: tokens are read by twos. As those of `costs_of`, a measurement decides for 30 days.
    """
    if backend.forward_together is None or len(backend.experts) < 2:
        return None
    size = 2 if exact else 1
    path = costs_file(bundle, backend, precision, threads, ("together", size, LENGTH))
    if path is None:
        return measure(bundle, backend, size)
    if (known := read_prices(path)) is None:
        keep(path, asdict(measure(bundle, backend, size)))
        known = read_prices(path)
    return known or measure(bundle, backend, size)


def read_prices(path: Path, clock: Clock = time.time) -> PassPrices | None:
    """The prices in a file; None if it holds none, or is too old."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        known = dict(read_checked(path) or {})
        if clock() - known.pop("measured") <= VALID:
            return PassPrices(**known)
    return None


def measure(bundle: Bundle, backend: Backend, size: int) -> PassPrices:
    """Time passes over `size` tokens of each model that reads, in turns; the fastest of each counts."""
    together = backend.forward_together
    assert together is not None
    router, *experts = caches = [model.cache() for model in (backend.router, *backend.experts)]
    length, read = max(0, min(LENGTH, bundle.manifest.max_seq_len - size)), segment(size)
    work: list[Callable[[], object]] = [
        lambda: together([(router, read), (experts[0], read)]),
        lambda: together([(cache, read) for cache in caches]),
        lambda: together([(experts[0], read)]),
    ]
    seconds: list[list[float]] = [[] for _ in work]
    for _ in range(REPEATS + 1):  # the first round warms up
        for run, times in zip(work, seconds, strict=True):
            for cache in caches:
                cache.length = length  # the keys and values there do not affect the time
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    pair, every, alone = (min(times[1:]) for times in seconds)
    return PassPrices(pair, every, alone, len(experts))
