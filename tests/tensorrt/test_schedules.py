"""Whatever order the streams run in, tokens are those of the same graphs run one after another."""

from itertools import product
from pathlib import Path
from unittest.mock import patch

import pytest

from runtime import FusionRuntime
from runtime.tensorrt.model import reach
from tests.simulated.bundles import CHUNK
from tests.simulated.install import simulated
from tests.simulated.machine import POLICIES, Machine
from tests.simulated.plain import in_turn
from tests.tensorrt.scenarios import PROMPT, SCENARIOS, greedy, play


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("integrated", [False, True])
def test_tokens_are_those_of_the_graphs_run_in_turn(folder: Path, policy: str, integrated: bool) -> None:
    for seed in range(4):
        texts = play(greedy, folder, Machine(seed, policy, integrated))
        for prompt, (tokens, experts, _) in zip((PROMPT, [30, 2]), texts, strict=True):
            assert (tokens, experts) == in_turn(folder, prompt, 14, CHUNK)


@pytest.mark.parametrize("name", SCENARIOS)
def test_no_schedule_changes_a_result(folder: Path, name: str) -> None:
    expected = play(SCENARIOS[name], folder, Machine())
    for policy, integrated, seed in product(("late", "random", "starved"), (False, True), range(2)):
        assert play(SCENARIOS[name], folder, Machine(seed, policy, integrated)) == expected, (policy, integrated, seed)


def test_long_texts_cross_the_lengths_that_graphs_are_captured_for(folder: Path) -> None:
    machine = Machine(0, "random")
    with patch("runtime.session.CHUNK", CHUNK), simulated(machine) as cuda, FusionRuntime.load(folder, device="rtx") as rt:
        result = rt.generate([3], 270)
    assert (result.token_ids, result.experts) == in_turn(folder, [3], 270, CHUNK)
    lengths = {reach(length, rt.max_seq_len) for length in range(1, 272)}
    assert lengths == {128, 256, 320}
    assert cuda.launches > 0.9 * 3 * 270, "nearly all steps of router, expert and fusion are captured graphs"


def test_lengths_are_powers_of_two() -> None:
    assert [reach(n, 4000) for n in (1, 128, 129, 256, 257, 2049, 4000)] == [128, 128, 256, 256, 512, 4000, 4000]
