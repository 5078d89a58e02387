"""Experts' factors on the device: all of them, or as many as a budget holds.

The factors of all experts have the same sizes, so that a slot of device memory holds those of any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fusionroute.runtime.errors import InputError
from fusionroute.runtime.expert_memory import check_budget
from fusionroute.runtime.tensorrt.device import Device, Memory, Stream, aligned

Arrays = Mapping[str, np.ndarray]  # an expert's factors, as `map_factors` gives them


class Slot:
    """Device memory with the factors of one expert. `addresses`: of each factor."""

    def __init__(self, device: Device, offsets: Mapping[str, int], size: int):
        self.memory = device.memory(size)
        self.addresses = {name: self.memory.address + offset for name, offset in offsets.items()}
        self.ready = device.event()  # reached when the factors have arrived
        self.free = device.event()  # reached when the last pass that reads them is over


class FactorSlots:
    """Slots for experts by number. Where not all fit, the least recently used leave; they are read-only, so nothing is
    copied back.

    Raises InputError where the budget does not hold one expert, and on devices that share the host's memory, where
    evicting saves none.
    """

    def __init__(self, device: Device, stream: Stream, experts: Sequence[Arrays], budget: int | None):
        """`stream` reads the factors."""
        if budget is not None and device.integrated:
            raise InputError("This device shares the host's memory, where evicting experts saves nothing: load without expert_memory.")
        offsets, self.size = {}, 0
        for name, array in experts[0].items():
            offsets[name] = self.size
            self.size += aligned(array.nbytes)
        count = len(experts)
        if budget is not None:
            check_budget(budget, self.size)
            count = min(count, budget // self.size)
        self._reader, self._stream = stream, device.stream()
        self._copies = [pinned(device, arrays, offsets, self.size) for arrays in experts]
        self.slots = [Slot(device, offsets, self.size) for _ in range(count)]
        self._resident: dict[int, Slot] = {}  # the least recently used first
        for number in range(count):
            self.bring(number)
        if count == len(experts):  # they stay
            for slot in self.slots:
                slot.ready.wait()
            self._copies.clear()

    def bring(self, expert: int | None) -> Slot:
        """The slot of an expert, where its factors are before later work of the reader. None: a slot of any expert.

        That one is the first in any case: what is captured with it stays valid.
        """
        if expert is None:
            return self.slots[0]
        if expert in self._resident:
            slot = self._resident.pop(expert)
        else:
            slot = self.slots[len(self._resident)] if len(self._resident) < len(self.slots) else self._evicted()
            self._stream.upload(slot.memory.address, self._copies[expert].address, self.size)
            self._stream.record(slot.ready)
            self._reader.wait(slot.ready)
        self._resident[expert] = slot
        return slot

    def _evicted(self) -> Slot:
        """The slot of the least recently used, to be written once no pass reads it."""
        slot = self._resident.pop(next(iter(self._resident)))
        self._stream.wait(slot.free)
        return slot

    def used(self, slot: Slot) -> None:
        """What the reader has queued so far reads a slot. Nobody asks where all experts stay."""
        if self._copies:
            self._reader.record(slot.free)


def pinned(device: Device, arrays: Arrays, offsets: Mapping[str, int], size: int) -> Memory:
    """A copy of an expert's factors in pinned memory."""
    memory = device.pinned(size)
    for name, array in arrays.items():
        memory.write(offsets[name], array)
    return memory
