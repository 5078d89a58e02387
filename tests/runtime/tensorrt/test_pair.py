"""One engine for router and experts on the simulated device: tokens, orders, waits, buffers and factors that move."""

from itertools import product
from pathlib import Path

import pytest

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.tensorrt.factors import FactorSlots
from tests.runtime.tensorrt.scenarios import PROMPT, SCENARIOS, greedy, play
from tests.support.simulated.bundles import CHUNK, write_pair_bundle
from tests.support.simulated.install import simulated
from tests.support.simulated.machine import POLICIES, Machine
from tests.support.simulated.plain import in_turn


@pytest.fixture(scope="module", params=[False, True], ids=["in place", "rows"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of hand-written graphs with one base: a router and three experts, for both kinds of engines."""
    return write_pair_bundle(tmp_path_factory.mktemp("pair") / "bundle", rows=request.param)


@pytest.fixture(scope="module")
def size(pair: Path) -> int:
    """Bytes of one expert's factors on the device."""
    with simulated(Machine()), FusionRuntime.load(pair, device="rtx") as rt:
        factors: FactorSlots = rt.backend._pair.factors  # type: ignore[attr-defined]
        return factors.size


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("integrated", [False, True])
def test_tokens_are_those_of_the_graph_run_for_each_model_alone(pair: Path, policy: str, integrated: bool) -> None:
    for seed in range(2):
        texts = play(greedy, pair, Machine(seed, policy, integrated))
        for prompt, (tokens, experts, _) in zip((PROMPT, [30, 2]), texts, strict=True):
            assert (tokens, experts) == in_turn(pair, prompt, 14, CHUNK)
            assert len(set(experts)) > 1, "guesses are wrong at times"


@pytest.mark.parametrize("name", SCENARIOS)
def test_no_schedule_and_no_budget_changes_a_result(pair: Path, size: int, name: str) -> None:
    expected = play(SCENARIOS[name], pair, Machine())
    for (policy, integrated), seed in product((("late", False), ("random", True), ("starved", False)), range(2)):
        assert play(SCENARIOS[name], pair, Machine(seed, policy, integrated)) == expected, (policy, integrated, seed)
    if name != "given up":  # interrupts come at other waits
        for policy, count in (("late", 1), ("random", 2)):
            assert play(SCENARIOS[name], pair, Machine(1, policy), count * size + 100) == expected, (policy, count)
