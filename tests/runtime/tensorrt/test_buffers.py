"""Every buffer is needed: shared with another one that is in use at the same time, some schedule shows it."""

from pathlib import Path
from typing import Any

import pytest

from fusionroute.runtime import FusionRuntime
from tests.runtime.tensorrt.scenarios import interleaved, play
from tests.support.simulated.machine import Machine


def two_texts(rt: FusionRuntime, machine: Machine) -> list[Any]:
    return interleaved(rt, machine, 2)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("integrated", [False, True])
def test_a_buffer_reused_early_is_caught(folder: Path, integrated: bool) -> None:
    """For each buffer of two texts made at once, the memory of some other one is too early to take."""
    machine = Machine(0, "late", integrated)
    expected, buffers = play(two_texts, folder, machine), list(machine.allocations)
    assert len(buffers) == (35 if integrated else 60)
    survivors, known = [], {}
    for number, buffer in enumerate(buffers):
        others = [other for other in range(len(buffers)) if other != number and buffers[other].on_host == buffer.on_host]
        for other in sorted(others, key=lambda other: abs(other - number)):
            pair = max(number, other), min(number, other)
            if pair not in known:
                known[pair] = wrong(folder, pair, integrated, expected)
            if how := known[pair]:
                print(f"{buffer.name} in that of {other} | {how}")
                break
        else:
            survivors.append(buffer.name)
    assert not survivors


def wrong(folder: Path, shared: tuple[int, int], integrated: bool, expected: Any) -> str | None:
    """What shows that two buffers are in one place, or None."""
    try:
        right = play(two_texts, folder, Machine(1, "late", integrated, shared=shared)) == expected
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None if right else "other tokens"
