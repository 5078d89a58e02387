"""The machine: streams as queues of work, an adversarial scheduler, a timeline, and faults for mutation tests."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.support.simulated.clocks import Clock
from tests.support.simulated.memory import HOST, Allocation, Fault, Heap, touch
from tests.support.simulated.sites import chain, site

POLICIES = ("early", "late", "random", "starved")
ROOM = 1 << 17  # bytes: a buffer that two names stand for has room for either


class Range(NamedTuple):
    """Bytes that a piece of work reads or writes, by the device's address (the host's for the host's end of a copy)."""

    address: int
    size: int
    by_device: bool = True


@dataclass(eq=False)
class Mark:
    """One recording of an event."""

    done: bool = False
    clock: Clock = field(default_factory=Clock)
    time: float = 0.0


@dataclass(eq=False)
class Work:
    """A piece of work on a stream: a copy, an engine.

    `run` returns what it wrote beside what `writes` says, where only running tells.
    """

    name: str
    reads: list[Range]
    writes: list[Range]
    run: Callable[[], list[Range] | None]
    duration: float
    host_reads: list[tuple[Allocation, int, int, bytes]] = field(default_factory=list)
    clock: Clock = field(default_factory=Clock)
    time: float = 0.0


class Recorded(NamedTuple):
    """An entry of a stream's queue: the mark is reached here."""

    mark: Mark
    clock: Clock


class Awaited(NamedTuple):
    """An entry of a stream's queue: it waits for the mark here."""

    mark: Mark


class Span(NamedTuple):
    """An entry of the timeline, in units of the simulated device's time."""

    stream: int
    name: str
    start: float
    end: float


class Stream:
    """A queue of work."""

    def __init__(self, number: int):
        self.number = number
        self.queue: deque[Work | Recorded | Awaited] = deque()
        self.clock = Clock()
        self.time = 0.0
        self.captured: list[Work] | None = None


class Machine:
    """`skipped`: the site of a wait that does nothing; `shared`: numbers of an allocation and of one it aliases."""

    def __init__(
        self,
        seed: int = 0,
        policy: str = "early",
        integrated: bool = False,
        sm: int = 89,
        skipped: str | None = None,
        shared: tuple[int, int] | None = None,
    ):
        self.random = random.Random(seed)
        self.policy, self.integrated, self.sm, self.skipped, self.shared = policy, integrated, sm, skipped, shared
        self.heap = Heap()
        self.streams: list[Stream] = []
        self.clock = Clock()  # the host's
        self.time = 0.0
        self.timeline: list[Span] = []
        self.sites: dict[str, int] = {}  # waits by where they are called
        self.weights = self.most_weights = 0  # bytes of engines on the device
        self.faults: list[Fault] = []
        # called while the host waits: what another thread does meanwhile
        self.meanwhile: Callable[[], None] | None = None
        self.interrupt = 0  # index of the wait that is interrupted, counted from now on; 0: none
        self.blocked = 0  # waits of the host for work that was not done yet
        self.allocations: list[Allocation] = []
        self.lock = threading.RLock()
        self.priorities: dict[int, float] = {}

    # -- memory -------------------------------------------------------------------------------------------------------

    def allocate(self, size: int, on_host: bool) -> Allocation:
        """Memory named after the code that asks for it."""
        number = len(self.allocations)
        if self.shared is not None and self.shared[1] == number:
            size = max(size, ROOM)
        if self.shared is not None and self.shared[0] == number and not self.allocations[self.shared[1]].freed:
            allocation = self.allocations[self.shared[1]]
        else:
            allocation = self.heap.allocate(f"buffer {number} ({' < '.join(name for name, _ in chain())})", size, on_host)
        self.allocations.append(allocation)
        return allocation

    # -- work ---------------------------------------------------------------------------------------------------------

    def stream(self) -> Stream:
        """A new stream; its number is its actor in clocks."""
        stream = Stream(len(self.streams) + 1)
        self.streams.append(stream)
        self.priorities[stream.number] = self.random.random()
        return stream

    def submit(self, stream: Stream, work: Work) -> None:
        """Queue work, or note it where the stream is being captured."""
        self.tick()
        if stream.captured is not None:
            stream.captured.append(work)
            return
        copy = Work(work.name, work.reads, work.writes, work.run, work.duration)
        copy.clock, copy.time = self.clock.copy(), self.time
        for part in work.reads:  # the host must not change what it wrote until the device has read it
            allocation, offset = self.heap.find(*part[:2], work.name, part.by_device)
            if allocation.on_host:
                copy.host_reads.append((allocation, offset, part.size, allocation.data[offset : offset + part.size].tobytes()))
        stream.queue.append(copy)
        self.idle()

    def record(self, stream: Stream) -> Mark:
        """A mark behind what is queued so far."""
        self.tick()
        mark = Mark()
        stream.queue.append(Recorded(mark, self.clock.copy()))
        self.idle()
        return mark

    def wait(self, stream: Stream, mark: Mark | None) -> None:
        """Later work of a stream waits for a mark."""
        self.tick()
        if not self.skips("stream waits") and mark is not None:
            stream.queue.append(Awaited(mark))
        self.idle()

    def wait_on_host(self, mark: Mark | None) -> None:
        """The host waits for a mark."""
        self.tick()
        if self.skips("host waits") or mark is None:
            return
        if not mark.done and self.interrupt:
            self.interrupt -= 1
            if not self.interrupt:
                raise KeyboardInterrupt
        self.blocked += not mark.done
        self.finish(mark)
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()

    def finish(self, mark: Mark) -> None:
        """Run work, as the policy has it, until a mark is reached; the host then knows what the mark knows."""
        while not mark.done:
            if self.policy == "late":
                self._towards(mark)
            else:
                self._advance(self._choose())
        self.clock.join(mark.clock)
        self.time = max(self.time, mark.time)

    def run_out(self) -> None:
        """Run all work that is left. Raises the first Fault of all."""
        while ready := self._ready():
            self._advance(ready[0])
        if self.faults:
            raise self.faults[0]

    def tick(self) -> None:
        """The host does something."""
        self.clock[HOST] += 1
        self.time += 0.1

    def idle(self) -> None:
        """What the device does between two calls of the host."""
        if self.policy == "early":
            while ready := self._ready():
                self._advance(ready[0])
        elif self.policy == "random":
            while self.random.random() < 0.5 and (ready := self._ready()):
                self._advance(self.random.choice(ready))

    def _ready(self) -> list[Stream]:
        return [s for s in self.streams if s.queue and not (isinstance(head := s.queue[0], Awaited) and not head.mark.done)]

    def _choose(self) -> Stream:
        ready = self._ready()
        if not ready:
            raise Fault("the host waits for ever: no stream can go on")
        if self.policy == "starved":  # one stream gets its turn only when all others wait
            return max(ready, key=lambda stream: self.priorities[stream.number])
        return self.random.choice(ready)

    def _towards(self, mark: Mark) -> None:
        """One step of what a mark needs, and of nothing else."""
        stream = next((s for s in self.streams if any(isinstance(e, Recorded) and e.mark is mark for e in s.queue)), None)
        if stream is None:
            raise Fault("the host waits for ever: what it waits for was never queued")
        head = stream.queue[0]
        if isinstance(head, Awaited) and not head.mark.done:
            self._towards(head.mark)
        else:
            self._advance(stream)

    def _advance(self, stream: Stream) -> None:
        """Run the first entry of a stream's queue."""
        entry = stream.queue.popleft()
        if isinstance(entry, Awaited):
            stream.clock.join(entry.mark.clock)
            stream.time = max(stream.time, entry.mark.time)
        elif isinstance(entry, Recorded):
            stream.clock.join(entry.clock)
            entry.mark.clock, entry.mark.time, entry.mark.done = stream.clock.copy(), stream.time, True
        else:
            stream.clock.join(entry.clock)
            stream.clock[stream.number] += 1
            start = max(stream.time, entry.time)
            stream.time = start + entry.duration
            self.timeline.append(Span(stream.number, entry.name, start, stream.time))
            self._touch(stream, entry.name, entry.reads, writes=False)
            self._unchanged(entry)
            self._touch(stream, entry.name, entry.writes, writes=True)
            self._touch(stream, entry.name, entry.run() or [], writes=True)

    def _touch(self, stream: Stream, name: str, parts: list[Range], writes: bool) -> None:
        for part in parts:
            allocation, offset = self.heap.find(part.address, part.size, name, part.by_device)
            touch(allocation, offset, offset + part.size, writes, stream.number, stream.clock, name)

    def _unchanged(self, work: Work) -> None:
        for allocation, offset, size, before in work.host_reads:
            if allocation.data[offset : offset + size].tobytes() != before and not self._by_device(allocation, offset, size):
                raise Fault(f"the host wrote {allocation.name} before {work.name} had read it")

    @staticmethod
    def _by_device(allocation: Allocation, low: int, size: int) -> bool:
        """Whether a stream wrote to host memory: then clocks tell what is in order."""
        return any(a.writes and a.low < low + size and low < a.high for a in allocation.history)

    # -- mutations ----------------------------------------------------------------------------------------------------

    def skips(self, kind: str) -> bool:
        """Note where an event is used; returns whether a mutation leaves it out there."""
        where = f"{kind}: {site()}"
        self.sites[where] = self.sites.get(where, 0) + 1
        return where == self.skipped
