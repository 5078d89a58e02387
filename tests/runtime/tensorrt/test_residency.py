"""Experts that do not all fit: same tokens, no more weights on the device than allowed, fetches beside other work."""

from pathlib import Path

import pytest

from fusionroute.runtime import FusionRuntime, InputError
from tests.runtime.tensorrt.scenarios import SCENARIOS, interleaved, play
from tests.support.simulated.install import simulated
from tests.support.simulated.machine import POLICIES, Machine, Span
from tests.support.simulated.tensorrt import WEIGHTS

ALWAYS = 2 * WEIGHTS  # router and fusion stay


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
def test_same_results_within_the_budget(folder: Path, policy: str, experts: int) -> None:
    for name, scenario in SCENARIOS.items():
        if name != "given up":
            machine = Machine(1, policy)
            assert play(scenario, folder, machine, experts * WEIGHTS + 100) == play(scenario, folder, Machine()), name
            assert machine.most_weights == ALWAYS + experts * WEIGHTS


def test_the_least_recently_used_expert_leaves(folder: Path) -> None:
    machine = Machine()
    with simulated(machine), FusionRuntime.load(folder, device="rtx", expert_memory=2 * WEIGHTS) as rt:
        session = rt.session()
        session.append([3, 4])
        fetched = []
        for expert in (0, 1, 0, 2, 0, 1):
            before = len(fetches(machine))
            session._decoder.readers.read_expert(expert, [len(session) - 1])
            fetched.append(len(fetches(machine)) - before)
    assert fetched == [1, 1, 0, 1, 0, 1]  # expert 1 left for 2, and 2 for 1: 0 was used more recently both times


def test_fetches_overlap_other_work(folder: Path) -> None:
    """Beside the router: of the same text where the expert is known before, of another text else."""
    machine = Machine(1, "late")
    play(interleaved, folder, machine, WEIGHTS)
    assert sum(bool(beside(span, machine)) for span in fetches(machine)) >= 3
    machine = Machine(1, "late")
    with simulated(machine), FusionRuntime.load(folder, device="rtx", expert_memory=WEIGHTS) as rt:
        sessions = [rt.session(expert=name) for name in ("expert1", "expert2")]
        for number in range(6):
            sessions[number % 2].append([3, 4])
            sessions[number % 2].step()
    copies = fetches(machine)
    assert len(copies) == 6
    assert all("run of router.tensorrt.fp32" in beside(fetch, machine) for fetch in copies[2:]), "the first steps clear their caches"


def fetches(machine: Machine) -> list[Span]:
    """Copies of whole weights to the device."""
    return [span for span in machine.timeline if span.name.startswith("upload") and "Residency" in span.name]


def beside(span: Span, machine: Machine) -> set[str]:
    """What runs on other streams during a part of a span."""
    return {other.name for other in machine.timeline if other.stream != span.stream and other.start < span.end and span.start < other.end}


def test_a_budget_below_one_expert_is_refused(folder: Path) -> None:
    with simulated(Machine()), pytest.raises(InputError, match=rf"expert_memory=100 does not hold the {WEIGHTS} bytes of one expert"):
        FusionRuntime.load(folder, device="rtx", expert_memory=100)
    with simulated(Machine(integrated=True)), pytest.raises(InputError, match="shares the host's memory"):
        FusionRuntime.load(folder, device="rtx", expert_memory=10**6)
