"""Requests of every kind, again and again: the same ones leave as many objects, and as many bytes handed out, as before."""

import gc
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.soak import KINDS, malloc
from fusionroute.runtime import FusionRuntime

SLACK = 64_000  # bytes: what the collector, and timers of cancellation, have not given back yet


def requests(runtimes: list[FusionRuntime], seed: int) -> tuple[int, int]:
    """All kinds on all runtimes; objects that the collector tracks, and bytes that malloc has handed out, afterwards.

    Objects that are frozen do not count.
    """
    draw = random.Random(seed)
    for request in KINDS.values():
        for runtime in runtimes:
            request(runtime, draw)
    gc.collect()
    return len(gc.get_objects()), sum(malloc()[:2])


@pytest.fixture
def earlier_objects_frozen() -> Iterator[None]:
    """What other tests left is not counted again and again: it is a million objects."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("earlier_objects_frozen")
@pytest.mark.parametrize("rounds", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_requests_leave_nothing_behind(bundles: list[Path], rounds: int) -> None:
    """Bytes are compared where this test runs long, and alone: all threads of a process allocate."""
    options = {"speculation": "auto", "catch_up": "background"}
    with (
        FusionRuntime.load(bundles[0], "int8", "cpu", threads=1) as plain,
        FusionRuntime.load(bundles[0], "int8", "cpu", threads=1, **options) as drafting,  # type: ignore[arg-type]
    ):
        for seed in range(4):  # shapes of passes that ONNX Runtime has not seen, and buffers that texts have not taken
            requests([plain, drafting], seed)
        objects, allocated = requests([plain, drafting], 0)
        for number in range(rounds):
            now = requests([plain, drafting], number % 4)
            assert now[0] <= objects + 50, f"after {number + 1} rounds more"
            assert rounds == 3 or now[1] <= allocated + SLACK, f"after {number + 1} rounds more"
