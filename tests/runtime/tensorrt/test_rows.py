"""Engines that return new keys and values, which the runtime appends to its buffers: all else is the same."""

from pathlib import Path
from typing import Any

import pytest

from fusionroute.runtime.tensorrt.device import Stream
from tests.runtime.tensorrt.scenarios import SCENARIOS, play
from tests.runtime.tensorrt.test_buffers import two_texts, wrong
from tests.runtime.tensorrt.test_events import KINDS, ORDERS, player
from tests.support.simulated.bundles import write_bundle
from tests.support.simulated.machine import Machine
from tests.support.simulated.memory import Fault
from tests.support.simulated.tensorrt import WEIGHTS

ROWS = "(new_rows < Model.__init__ <"  # where their memory is taken


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the other tests with graphs for TensorRT 10.3."""
    return write_bundle(tmp_path_factory.mktemp("engines") / "bundle", rows=True)


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("budget", [None, WEIGHTS])
def test_results_are_those_of_buffers_written_in_place(folder: Path, rows: Path, name: str, budget: int | None) -> None:
    expected = play(SCENARIOS[name], folder, Machine(0, "late"))
    for policy, seed in ORDERS[:3]:
        assert play(SCENARIOS[name], rows, Machine(seed, policy), budget) == expected


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_every_event_of_a_pass_is_needed_here_too(rows: Path) -> None:
    cases = {
        (kind, name): Machine(0, "late", **options) for kind, options in KINDS.items() for name in ("greedy", "interleaved", "given up")
    }
    results = {case: player(*case, rows)(machine) for case, machine in cases.items()}
    sites = sorted({site for machine in cases.values() for site in machine.sites if "Cache._queue" in site})
    assert len(sites) >= 8

    def shown(site: str) -> bool:
        orders = [(case, order) for order in ORDERS for case, machine in cases.items() if site in machine.sites]
        return any(goes_wrong(rows, case, order, site, results[case]) for case, order in orders)

    assert [site for site in sites if not shown(site)] == []


def goes_wrong(rows: Path, case: tuple[str, str], order: tuple[str, int], site: str, expected: Any) -> bool:
    """Whether a schedule without an event shows it."""
    policy, seed = order
    try:
        return bool(player(*case, rows)(Machine(seed, policy, skipped=site, **KINDS[case[0]])) != expected)
    except Exception as error:  # a Fault, or what the runtime makes of garbage
        print(f"{site} | {case}, {policy}, seed {seed} | {type(error).__name__}: {error}")
        return True


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_rows_memory_is_no_other_buffers(rows: Path) -> None:
    machine = Machine(0, "late")
    expected, buffers = play(two_texts, rows, machine), list(machine.allocations)
    mine = [number for number, buffer in enumerate(buffers) if ROWS in buffer.name]
    assert mine
    for number in mine:
        others = [other for other, buffer in enumerate(buffers) if other != number and buffer.on_host == buffers[number].on_host]
        assert any(wrong(rows, (max(number, other), min(number, other)), False, expected) for other in others), buffers[number].name


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("mutation", ["skipped", "one short", "elsewhere"])
def test_a_wrong_copy_is_caught(rows: Path, monkeypatch: pytest.MonkeyPatch, mutation: str) -> None:
    expected = play(SCENARIOS["greedy"], rows, Machine(0, "late"))
    copy = Stream.copy_rows

    def changed(stream: Stream, target: int, target_pitch: int, source: int, source_pitch: int, width: int, count: int) -> None:
        if mutation == "one short":
            copy(stream, target, target_pitch, source, source_pitch, width, count - 1)
        elif mutation == "elsewhere":
            copy(stream._device.stream(), target, target_pitch, source, source_pitch, width, count)

    monkeypatch.setattr(Stream, "copy_rows", changed)
    try:
        assert play(SCENARIOS["greedy"], rows, Machine(1, "late")) != expected
    except Fault as error:
        print(f"{mutation} | {type(error).__name__}: {error}")
