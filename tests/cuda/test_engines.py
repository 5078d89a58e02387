"""TensorRT's backend on CUDA's own streams, events and graphs; engines are ONNX graphs that run on the host.

Whatever the order of the streams, results are those of the simulated device, which are those of the graphs in turn.
"""

from collections.abc import Callable
from contextlib import nullcontext
from ctypes import CDLL
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.tensorrt.device import Device, Event, Stream
from tests.runtime.tensorrt.scenarios import SCENARIOS, greedy, play
from tests.support.engines_on_host import engines_on_host
from tests.support.in_threads import generated_together
from tests.support.simulated.bundles import CHUNK, add_engines, write_pair_bundle
from tests.support.simulated.machine import Machine
from tests.support.simulated.plain import in_turn
from tests.support.simulated.tensorrt import WEIGHTS

FAST = ("greedy", "interleaved")
KINDS = ("copied", "mapped", "evicted")


class Waits:
    """What scenarios ask of a machine: an interrupt at some wait of the host, and work while it waits."""

    def __init__(self) -> None:
        self.interrupt = 0
        self.meanwhile: Callable[[], None] | None = None

    def wait(self, event: Event, wait: Callable[[Event], None]) -> None:
        if self.interrupt:
            self.interrupt -= 1
            if not self.interrupt:
                raise KeyboardInterrupt
        wait(event)
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()


def run(scenario: Callable[..., Any], folder: Path, kind: str = "copied") -> Any:
    """A scenario's results."""
    waits, wait, attribute = Waits(), Event.wait, Device._attribute
    mapped = patch.object(Device, "_attribute", lambda device, each: attribute(device, each) or "Integrated" in each.name)
    with (
        patch("fusionroute.runtime.limits.CHUNK", CHUNK),
        patch.object(Event, "wait", lambda event: waits.wait(event, wait)),
        mapped if kind == "mapped" else nullcontext(),
        engines_on_host() as library,
    ):
        budget = WEIGHTS if kind == "evicted" else None
        with FusionRuntime.load(folder, device="rtx", expert_memory=budget) as rt:
            results = scenario(rt, waits)
        del rt
        library.device.finish()
        assert not library.faults
    return results


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SCENARIOS if name not in FAST)])
def test_results_are_those_of_the_simulated_device(folder: Path, name: str, kind: str) -> None:
    assert run(SCENARIOS[name], folder, kind) == play(SCENARIOS[name], folder, Machine())


def test_one_base_for_all_models(device: Device, tmp_path: Path) -> None:
    bundle = add_engines(write_pair_bundle(tmp_path / "bundle"), CHUNK, (89, device.sm))
    texts = run(greedy, bundle)
    assert [(tokens, experts) for tokens, experts, _ in texts] == [
        in_turn(bundle, prompt, 14, CHUNK) for prompt in ([*range(3, 12)], [30, 2])
    ]


def test_nearly_all_steps_are_captured_graphs(folder: Path) -> None:
    launches, launch = 0, Stream.launch

    def count(stream: Stream, graph: Any) -> None:
        nonlocal launches
        launches += 1
        launch(stream, graph)

    with patch.object(Stream, "launch", count):
        tokens = run(lambda rt, _: rt.generate([3], 150).token_ids, folder)
    assert tokens == in_turn(folder, [3], 150, CHUNK)[0]
    assert launches > 0.9 * 3 * 150


def test_threads_get_what_one_thread_gets(folder: Path) -> None:
    prompts = [[3 + number, 7, 20 - number] for number in range(4)]
    texts = run(lambda rt, _: generated_together(rt, prompts, 12), folder)
    assert texts == [in_turn(folder, prompt, 12, CHUNK)[0] for prompt in prompts]


def test_a_missing_wait_is_noticed(folder: Path, on_host: CDLL | None) -> None:
    """On the host, where queues run as late as waits allow; a GPU may be done by luck."""
    if on_host is None:
        pytest.skip("a GPU may have done the work by then")
    expected = run(greedy, folder)
    with patch.object(Stream, "wait", lambda *_: None):
        try:
            noticed = run(greedy, folder) != expected
        except Exception:  # what the runtime makes of garbage
            noticed = True
    on_host.host_cuda_forget()
    assert noticed
