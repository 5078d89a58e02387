"""The example node: frames are dropped, texts end in time, a stuck planner is cancelled, everything shuts down."""

import importlib.util
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.stream import Result
from tests.support.bundles import copy_with_ends
from tests.support.paths import REPOSITORY
from tests.support.waiting import until

EXAMPLE = REPOSITORY / "examples" / "node.py"


@pytest.fixture(scope="module")
def node() -> Any:
    spec = importlib.util.spec_from_file_location("example_node", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = sys.modules["example_node"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_frames_are_dropped_and_texts_end_in_time(node: Any, bundles: list[Path], tmp_path: Path) -> None:
    with FusionRuntime.load(copy_with_ends(bundles[0], tmp_path / "bundle", []), threads=1) as rt:
        robot = node.Node(rt, period=0.005, budget=0.05, patience=60.0, max_new_tokens=900)
        robot.start()
        until(lambda: len(robot.planner.plans) >= 6)
        robot.shutdown()
        assert not any(thread.is_alive() for thread in robot._threads)
    plans, frames = robot.planner.plans, robot.frames
    assert {plan.reason for plan in plans[:-1]} == {"deadline"} and not plans[0].complete, "900 tokens do not fit the budget"
    assert plans[-1].reason in ("deadline", "cancelled")
    numbers = [plan.frame for plan in plans]
    assert numbers == sorted(set(numbers)) and frames.dropped > 0
    waiting = robot.camera.produced - frames.dropped - len(plans)
    assert waiting in (0, 1), "every frame was dropped, answered, or waits in the queue of one"
    assert robot.watchdog.bites == 0


class Stuck:
    """A runtime that gives no token until it is cancelled."""

    def generate(self, prompt: str, most: int, *, deadline: float, cancel: threading.Event, on_token: Any) -> Result:
        assert cancel.wait(60)
        return Result("", [], [], [], "cancelled")


def test_the_watchdog_cancels_what_gives_no_token(node: Any) -> None:
    robot = node.Node(Stuck(), period=0.005, patience=0.05)
    robot.start()
    until(lambda: robot.watchdog.bites >= 2)
    robot.shutdown()
    assert {plan.reason for plan in robot.planner.plans} == {"cancelled"}


def test_the_planner_ends_when_the_runtime_is_closed(node: Any, bundles: list[Path]) -> None:
    rt = FusionRuntime.load(bundles[0], threads=1)
    robot = node.Node(rt, period=0.005)
    robot.start()
    until(lambda: robot.planner.plans)
    rt.close()
    planner = robot._threads[1]
    planner.join(60)
    assert not planner.is_alive() and robot.planner.error is None and not robot.stop.is_set()
    robot.shutdown()
