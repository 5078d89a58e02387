"""The benchmark on the simulated device: the same figures, the device's memory, and captured steps left as they are."""

from pathlib import Path
from unittest.mock import patch

import pytest

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.bench import bandwidth
from fusionroute.runtime.bench.bench import BenchOptions, bench
from fusionroute.runtime.errors import UnavailableError
from fusionroute.runtime.tensorrt.device import Device
from tests.support.simulated.bundles import CHUNK
from tests.support.simulated.install import simulated
from tests.support.simulated.machine import POLICIES, Machine
from tests.support.simulated.tensorrt import WEIGHTS


@pytest.mark.parametrize("policy", POLICIES)
def test_bench_on_engines(folder: Path, policy: str) -> None:
    machine = Machine(2, policy)
    with patch("fusionroute.runtime.limits.CHUNK", CHUNK), simulated(machine):
        result = bench(folder, BenchOptions(device="rtx", prompt_tokens=9, new_tokens=8, repeats=2, rows="fused,router,expert1"))
        with FusionRuntime.load(folder, device="rtx") as rt:
            session = rt.session()
            session.append(bench_prompt(folder))
            experts = [session.step().expert for _ in range(8)]
    assert [row["runs"][n]["experts"] for row in result["rows"][:1] for n in range(2)] == [experts, experts]
    [precision] = result["precisions"]
    assert precision["device_memory"] > 5 * WEIGHTS, "router, three experts and the fusion stay"
    assert precision["bytes"] == sum(path.stat().st_size for path in (folder / "engines").iterdir())
    assert result["machine"]["compute_capability"] == machine.sm and result["device"] == "rtx"
    assert not any("CPU" in note for note in result["notes"])


def bench_prompt(folder: Path) -> list[int]:
    """The seeded ids that a bundle without a tokenizer gets."""
    from fusionroute.runtime.bench.prompt import prompt_ids
    from fusionroute.runtime.bundle import Bundle

    return prompt_ids(Bundle.open(folder), None, 9)


def test_copies_within_the_device_are_waited_for() -> None:
    machine = Machine(1, "late")
    with simulated(machine):
        device = Device()
        free = device.free_memory()
        with patch.object(bandwidth, "SMALLEST", 1 << 16):
            measured = bandwidth.of_device(device)
        assert measured.buffer == 1 << 16 and measured.bytes_per_second > 0
        assert device.free_memory() == free, "nothing stays"


def test_engines_that_are_missing_are_named(folder: Path) -> None:
    with simulated(Machine(sm=75)), pytest.raises(UnavailableError, match="are for sm86, sm89, but this machine's GPU is sm75"):
        bench(folder, BenchOptions(device="rtx", prompt_tokens=4, new_tokens=2))
