"""Whatever order the streams run in, tokens are those of the same graphs run one after another."""

from itertools import product
from pathlib import Path
from threading import Barrier, Thread
from unittest.mock import patch

import pytest

from fusionroute.runtime import ClosedError, FusionRuntime
from fusionroute.runtime.limits import reach
from tests.runtime.tensorrt.scenarios import PROMPT, SCENARIOS, greedy, play
from tests.support.in_threads import generated_together
from tests.support.simulated.bundles import CHUNK
from tests.support.simulated.install import simulated
from tests.support.simulated.machine import POLICIES, Machine
from tests.support.simulated.plain import in_turn
from tests.support.simulated.tensorrt import WEIGHTS


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
    with patch("fusionroute.runtime.limits.CHUNK", CHUNK), simulated(machine) as cuda, FusionRuntime.load(folder, device="rtx") as rt:
        result = rt.generate([3], 270)
    assert (result.token_ids, result.experts) == in_turn(folder, [3], 270, CHUNK)
    lengths = {reach(length, rt.max_seq_len) for length in range(1, 272)}
    assert lengths == {128, 256, 320}
    assert cuda.launches > 0.9 * 3 * 270, "nearly all steps of router, expert and fusion are captured graphs"


@pytest.mark.parametrize("experts", [None, 1])
def test_threads_get_what_one_thread_gets(folder: Path, experts: int | None) -> None:
    prompts = [[3 + number, 7, 20 - number] for number in range(6)]
    machine = Machine(3, "random")
    budget = None if experts is None else experts * WEIGHTS
    with (
        patch("fusionroute.runtime.limits.CHUNK", CHUNK),
        simulated(machine),
        FusionRuntime.load(folder, device="rtx", expert_memory=budget) as rt,
    ):
        texts = generated_together(rt, prompts, 12)
    machine.run_out()
    assert texts == [in_turn(folder, prompt, 12, CHUNK)[0] for prompt in prompts]


def test_lengths_are_powers_of_two() -> None:
    assert [reach(n, 4000) for n in (1, 128, 129, 256, 257, 2049, 4000)] == [128, 128, 256, 256, 512, 4000, 4000]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_runtime_that_is_closed_unused_frees_nothing_in_use(folder: Path, policy: str) -> None:
    for budget in (None, WEIGHTS):
        play(lambda *_: [], folder, Machine(1, policy), budget)


@pytest.mark.parametrize("policy", POLICIES)
def test_closing_under_way_ends_every_thread_and_frees_nothing_in_use(folder: Path, policy: str) -> None:
    machine, ends = Machine(3, policy), list[str]()
    with patch("fusionroute.runtime.limits.CHUNK", CHUNK), simulated(machine):
        rt = FusionRuntime.load(folder, device="rtx")
        started = Barrier(3)

        def work(rt: FusionRuntime) -> None:
            first = rt.stream(PROMPT, 12)
            next(first)
            started.wait(60)
            try:
                list(first)
                while True:
                    rt.generate(PROMPT, 12)
            except ClosedError as error:
                ends.append(str(error))

        workers = [Thread(target=work, args=(rt,), daemon=True) for _ in range(2)]
        for worker in workers:
            worker.start()
        started.wait(60)
        rt.close()
        del rt
        for worker in workers:
            worker.join(60)
        machine.run_out()
    assert ends == ["The runtime was closed: load the bundle again."] * 2
