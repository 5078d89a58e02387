"""Every wait and every recording of an event is needed: without one, some schedule faults or gives other tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.tensorrt.scenarios import SCENARIOS, play
from tests.support.simulated.machine import Machine
from tests.support.simulated.tensorrt import WEIGHTS

EVENTS = """
host waits: `block.event.wait()` in Copies.settle < Answer.routing
host waits: `block.event.wait()` in Copies.settle < Cache._settle < Cache.forward
host waits: `block.event.wait()` in Copies.settle < Cache.forward
host waits: `block.event.wait()` in Copies.settle < Copies.release < Cache.__del__
host waits: `block.event.wait()` in Copies.settle < DeviceFused.__getattr__
host waits: `block.event.wait()` in Copies.settle < DeviceFused.rows
host waits: `block.event.wait()` in Copies.settle < DeviceFuser._settle < DeviceFuser.__call__
host waits: `block.event.wait()` in Copies.settle < DeviceFuser._settle < DeviceFuser.__del__
host waits: `block.event.wait()` in Copies.settle < Rows.__array__
host waits: `block.event.wait()` in Copies.settle < Rows.__array__ < Rows.__getitem__
host waits: `block.event.wait()` in Mapped.settle < Answer.routing
host waits: `block.event.wait()` in Mapped.settle < Cache._settle < Cache.forward
host waits: `block.event.wait()` in Mapped.settle < Cache.forward
host waits: `block.event.wait()` in Mapped.settle < DeviceFused.__getattr__
host waits: `block.event.wait()` in Mapped.settle < DeviceFused.rows
host waits: `block.event.wait()` in Mapped.settle < DeviceFuser._settle < DeviceFuser.__call__
host waits: `block.event.wait()` in Mapped.settle < DeviceFuser._settle < DeviceFuser.__del__
host waits: `block.event.wait()` in Mapped.settle < Rows.__array__
host waits: `block.event.wait()` in Mapped.settle < Rows.__array__ < Rows.__getitem__
host waits: `done.wait()` in Copies.release < Cache.__del__
host waits: `done.wait()` in Mapped.release < Cache.__del__
host waits: `read.wait()` in Copies.release < Cache.__del__
host waits: `read.wait()` in Mapped.release < Cache.__del__
records: `self._stream.record(ready)` in Residency.bring < Cache._queue < Cache.forward
records: `self._stream.record(rows.read)` in DeviceFuser.__call__
records: `self._stream.record(self.done)` in DeviceFuser.__call__
records: `self.stream.record(block.event)` in Copies._mark < Copies.download < Answer.routing
records: `self.stream.record(block.event)` in Copies._mark < Copies.download < Cache.forward
records: `self.stream.record(block.event)` in Copies._mark < Copies.download < DeviceFused.rows
records: `self.stream.record(block.event)` in Copies._mark < Copies.download < DeviceFuser.__call__
records: `self.stream.record(block.event)` in Copies._mark < Copies.download < Rows.__array__
records: `self.stream.record(block.event)` in Copies._mark < Copies.download < Rows.__array__ < Rows.__getitem__
records: `self.stream.record(block.event)` in Copies._mark < Copies.upload < Cache._queue < Cache.forward
records: `self.stream.record(block.event)` in Copies._mark < Copies.upload < DeviceFuser.__call__
records: `self.stream.record(block.event)` in Copies._mark < Copies.upload < DeviceFuser._address < DeviceFuser.__call__
records: `stream.record(free)` in Cache._queue < Cache.forward
records: `stream.record(self.done)` in Cache._queue < Cache.forward
stream waits: `reader.wait(block.event)` in Copies.upload < Cache._queue < Cache.forward
stream waits: `reader.wait(block.event)` in Copies.upload < DeviceFuser.__call__
stream waits: `reader.wait(block.event)` in Copies.upload < DeviceFuser._address < DeviceFuser.__call__
stream waits: `reader.wait(ready)` in Residency.bring < Cache._queue < Cache.forward
stream waits: `self._stream.wait(idle)` in Residency.bring < Cache._queue < Cache.forward
stream waits: `self._stream.wait(rows.ready)` in DeviceFuser._address < DeviceFuser.__call__
stream waits: `self.stream.wait(free)` in Copies.upload < Cache._queue < Cache.forward
stream waits: `self.stream.wait(ready)` in Copies.download < Answer.routing
stream waits: `self.stream.wait(ready)` in Copies.download < Cache.forward
stream waits: `self.stream.wait(ready)` in Copies.download < DeviceFuser.__call__
stream waits: `self.stream.wait(ready)` in Copies.download < Rows.__array__
stream waits: `self.stream.wait(ready)` in Copies.download < Rows.__array__ < Rows.__getitem__
stream waits: `stream.wait(free)` in Cache._queue < Cache.forward
stream waits: `stream.wait(self.read)` in Cache._queue < Cache.forward
"""
KINDS: dict[str, dict[str, Any]] = {"copied": {}, "shared": {"integrated": True}, "evicted": {}}
ORDERS = [(policy, seed) for seed in range(3) for policy in ("late", "random", "starved")]


def player(kind: str, name: str, folder: Path) -> Callable[[Machine], Any]:
    return lambda machine: play(SCENARIOS[name], folder, machine, WEIGHTS if kind == "evicted" else None)


@pytest.fixture(scope="module")
def reference(folder: Path) -> tuple[dict[str, list[tuple[str, str]]], dict[tuple[str, str], Any]]:
    """Where the runtime waits or records → kinds and scenarios in which it does, and what those give."""
    sites: dict[str, list[tuple[str, str]]] = {}
    results = {}
    for kind, options in KINDS.items():
        for name in SCENARIOS:
            machine = Machine(0, "late", **options)
            results[kind, name] = player(kind, name, folder)(machine)
            for site in machine.sites:
                sites.setdefault(site, []).append((kind, name))
    return sites, results


def test_the_list_is_complete(reference: tuple[dict[str, Any], dict[Any, Any]]) -> None:
    assert sorted(reference[0]) == sorted(EVENTS.strip().splitlines())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("site", EVENTS.strip().splitlines())
def test_without_it_a_schedule_goes_wrong(
    site: str, folder: Path, reference: tuple[dict[str, list[tuple[str, str]]], dict[tuple[str, str], Any]]
) -> None:
    sites, results = reference
    for policy, seed in ORDERS:
        for kind, name in sites[site]:
            try:
                right = player(kind, name, folder)(Machine(seed, policy, skipped=site, **KINDS[kind])) == results[kind, name]
                how = "other tokens"
            except Exception as error:  # a Fault, or what the runtime makes of garbage
                right, how = False, f"{type(error).__name__}: {error}"
            if not right:
                print(f"{site} | {kind}, {name}, {policy}, seed {seed} | {how}")
                return
    pytest.fail("no schedule shows that it is needed")
