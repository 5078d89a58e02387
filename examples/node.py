"""A robot's node: a camera, a planner that asks the runtime about the newest frame, and a watchdog.

python examples/node.py dist/gemma2 [SECONDS]

Each class maps to a ROS 2 node: `Camera.run` is a timer callback that publishes, `Planner.frames` a subscription with a
queue of depth 1 (keep last), `Planner.plans` a publisher, `Watchdog.run` a timer. The runtime is loaded once per
process.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
import time
from dataclasses import dataclass

from fusionroute.runtime import ClosedError, FusionError, FusionRuntime

LOG = logging.getLogger("node")


@dataclass
class Frame:
    """What the camera saw, as a prompt."""

    number: int
    taken: float  # time.monotonic
    prompt: str


@dataclass
class Plan:
    """The answer to a frame. One that is not `complete` was cut short by the deadline or the watchdog."""

    frame: int
    text: str
    reason: str
    age: float  # seconds since the frame was taken

    @property
    def complete(self) -> bool:
        """Whether the text ended by itself."""
        return self.reason in ("stop", "length")


class Newest:
    """Back-pressure: a queue of depth one.

    A new frame replaces one that the planner has not taken, so that the planner never reads old frames.
    """

    def __init__(self) -> None:
        self._frames: queue.Queue[Frame] = queue.Queue(1)
        self.dropped = 0

    def put(self, frame: Frame) -> None:
        """Called by one thread."""
        try:
            self._frames.get_nowait()
            self.dropped += 1
        except queue.Empty:
            pass
        self._frames.put_nowait(frame)

    def get(self, timeout: float) -> Frame | None:
        """The newest frame, or None after `timeout` seconds."""
        try:
            return self._frames.get(timeout=timeout)
        except queue.Empty:
            return None


class Camera:
    """Produces a frame every `period` seconds, however long the planner takes."""

    def __init__(self, frames: Newest, period: float, stop: threading.Event):
        self._frames, self._period, self._stop = frames, period, stop
        self.produced = 0

    def run(self) -> None:
        """Produce frames until the node stops."""
        while not self._stop.wait(self._period):
            self._frames.put(Frame(self.produced, time.monotonic(), f"{10 + self.produced % 80}+{20 + self.produced % 70}="))
            self.produced += 1


class Planner:
    """Asks the runtime about the newest frame, for at most `budget` seconds since it was taken."""

    def __init__(self, rt: FusionRuntime, frames: Newest, budget: float, stop: threading.Event, max_new_tokens: int = 32):
        self._rt, self._frames, self._stop = rt, frames, stop
        self._budget, self._max_new_tokens = budget, max_new_tokens
        self.plans: list[Plan] = []
        self.cancel = threading.Event()  # set by the watchdog
        self.beat = time.monotonic()  # time of the last sign of life
        self.error: FusionError | None = None

    def run(self) -> None:
        """Answer frames until the node stops or the runtime is closed."""
        try:
            while not self._stop.is_set():
                self.beat = time.monotonic()
                if (frame := self._frames.get(timeout=0.05)) is not None:
                    self.plans.append(self._plan(frame))
        except ClosedError:
            LOG.info("the runtime was closed: the planner ends")
        except FusionError as error:
            self.error = error
            LOG.error("the planner ends: %s", error)
            self._stop.set()

    def _plan(self, frame: Frame) -> Plan:
        self.cancel.clear()
        if self._stop.is_set():  # the line above may have cleared the watchdog's last cancellation
            self.cancel.set()
        left = self._budget - (time.monotonic() - frame.taken)
        result = self._rt.generate(frame.prompt, self._max_new_tokens, deadline=left, cancel=self.cancel, on_token=self._note_token)
        return Plan(frame.number, result.text, result.finish_reason, time.monotonic() - frame.taken)

    def _note_token(self, token: object) -> None:
        self.beat = time.monotonic()


class Watchdog:
    """Cancels the planner's text when no token came for `patience` seconds: a second defence behind the deadline."""

    def __init__(self, planner: Planner, patience: float, stop: threading.Event):
        self._planner, self._patience, self._stop = planner, patience, stop
        self.bites = 0

    def run(self) -> None:
        """Watch until the node stops; then cancel the text under way."""
        while not self._stop.wait(self._patience / 4):
            if time.monotonic() - self._planner.beat > self._patience and not self._planner.cancel.is_set():
                self.bites += 1
                LOG.warning("no token for %.2f s: cancelled", self._patience)
                self._planner.cancel.set()
        self._planner.cancel.set()


class Node:
    """Three threads on one runtime. They shut down within one token."""

    def __init__(self, rt: FusionRuntime, period: float = 0.02, budget: float = 0.5, patience: float = 2.0, max_new_tokens: int = 32):
        self.stop = threading.Event()
        self.frames = Newest()
        self.camera = Camera(self.frames, period, self.stop)
        self.planner = Planner(rt, self.frames, budget, self.stop, max_new_tokens)
        self.watchdog = Watchdog(self.planner, patience, self.stop)
        runs = {"camera": self.camera.run, "planner": self.planner.run, "watchdog": self.watchdog.run}
        self._threads = [threading.Thread(target=run, name=name) for name, run in runs.items()]

    def start(self) -> None:
        """Start all threads."""
        for thread in self._threads:
            thread.start()

    def shutdown(self) -> float:
        """Stop and wait for all threads; returns the seconds this took."""
        start = time.monotonic()
        self.stop.set()
        for thread in self._threads:
            thread.join()
        return time.monotonic() - start


def main(bundle: str, seconds: str = "5") -> None:
    """Run the node for some seconds and print what it did."""
    with FusionRuntime.load(bundle) as rt:
        node = Node(rt)
        node.start()
        node.stop.wait(float(seconds))
        took = node.shutdown()
    plans, frames = node.planner.plans, node.camera.produced
    ages = sorted(plan.age for plan in plans)
    print(f"{frames} frames, {node.frames.dropped} dropped, {len(plans)} plans, {sum(plan.complete for plan in plans)} of them complete")
    if plans:
        print(f"age of a plan: median {ages[len(ages) // 2] * 1e3:.0f} ms, oldest {ages[-1] * 1e3:.0f} ms; last: {plans[-1]}")
    print(f"watchdog: {node.watchdog.bites}; shutdown took {took * 1e3:.0f} ms")
    if node.planner.error is not None:
        raise node.planner.error


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or not all(each.replace(".", "", 1).isdecimal() for each in sys.argv[2:]):
        sys.exit("usage: python examples/node.py BUNDLE [SECONDS]")
    logging.basicConfig(level=logging.INFO)
    try:
        main(*sys.argv[1:])
    except FusionError as error:
        sys.exit(f"error: {error}")
