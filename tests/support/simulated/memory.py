"""Memory of real bytes that records who wrote them in which order.

Unordered, early, late and wild accesses are faults.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from tests.support.simulated.clocks import Clock

POISON = 0xFF  # −1 in integers, NaN in every float format
HOST = 0  # the actor that calls the API; others are streams, by number
FIRST = 1 << 50  # device addresses are no addresses of this process


class Fault(Exception):
    """The program did something that works on a real device only by luck."""


class Access(NamedTuple):
    """Who touched a range of bytes, and when by its own clock."""

    low: int
    high: int
    writes: bool
    actor: int
    tick: int
    what: str


@dataclass(eq=False)
class Allocation:
    """One range of addresses. `valid` marks bytes that were written since they were allocated."""

    name: str
    address: int
    data: np.ndarray
    on_host: bool
    mapped: int = 0  # the device's address of host memory
    freed: bool = False
    valid: np.ndarray = field(init=False)
    history: list[Access] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.data[:] = POISON
        self.valid = np.full(len(self.data), self.on_host)  # what the host writes is not seen here


class Heap:
    """All allocations of a machine."""

    def __init__(self) -> None:
        self._device: list[tuple[int, Allocation]] = []  # by the device's address, which only grows
        self._host: list[tuple[int, Allocation]] = []
        self._next = FIRST
        self.used = 0  # bytes of device memory
        self.count = 0  # allocations ever made

    def allocate(self, name: str, size: int, on_host: bool) -> Allocation:
        """New poisoned memory. Host memory lies at its true address, so that numpy reads and writes it."""
        self.count += 1
        data = np.empty(size + 256, np.uint8)
        skip = -data.ctypes.data % 256
        data = data[skip : skip + size]
        device, self._next = self._next, self._next + -(-size // 256) * 256 + 4096
        allocation = Allocation(name, data.ctypes.data if on_host else device, data, on_host, device if on_host else 0)
        self._device.append((device, allocation))
        if on_host:
            insort(self._host, (allocation.address, allocation), key=first)
        self.used += 0 if on_host else size
        return allocation

    def free(self, address: int, clock: Clock) -> None:
        """Give back what was allocated at `address`: all use of it must have been waited for."""
        allocation, offset = self.find(address, 1, "free", by_device=address >= FIRST)
        if offset:
            raise Fault(f"free of {address:#x}, which is not the beginning of {allocation.name}")
        for access in allocation.history:
            if not clock.knows(access.actor, access.tick):
                raise Fault(f"{allocation.name} is freed while {access.what} may use it")
        allocation.freed = True
        allocation.data[:] = POISON
        self.used -= 0 if allocation.on_host else len(allocation.data)

    def remap(self, allocation: Allocation) -> None:
        """Give freed device memory back its address, poisoned: what CUDA's virtual memory does."""
        allocation.freed, allocation.history = False, []
        allocation.valid[:] = False
        self.used += len(allocation.data)

    def find(self, address: int, size: int, what: str, by_device: bool = True) -> tuple[Allocation, int]:
        """The allocation that holds a range, and the offset in it. Raises Fault for wild or freed ranges."""
        known = self._device if by_device else self._host
        if place := bisect_right(known, address, key=first):
            start, allocation = known[place - 1]
            if address + size <= start + len(allocation.data):
                if allocation.freed:
                    raise Fault(f"{what} uses {allocation.name} after it was freed")
                return allocation, address - start
        raise Fault(f"{what} uses {size} bytes at {address:#x}, which are not allocated as one")


def first(entry: tuple[int, Allocation]) -> int:
    """An entry's address, by which entries are sorted."""
    return entry[0]


def touch(allocation: Allocation, low: int, high: int, writes: bool, actor: int, clock: Clock, what: str) -> None:
    """Note an access. Raises Fault unless it is ordered after every earlier one that it conflicts with."""
    history = []
    for access in allocation.history:
        apart = access.high <= low or high <= access.low
        ordered = clock.knows(access.actor, access.tick)
        if not apart and not ordered and (writes or access.writes):
            raise Fault(f"{what} {'writes' if writes else 'reads'} {allocation.name} without waiting for {access.what}")
        replaced = ordered and low <= access.low and access.high <= high and (writes or not access.writes)
        if not replaced:
            history.append(access)
    allocation.history = history
    allocation.history.append(Access(low, high, writes, actor, clock[actor], what))
    if writes:
        allocation.valid[low:high] = True
