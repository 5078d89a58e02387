"""Experts' weights within a budget of device memory: the least recently used are evicted to pinned host memory."""

from __future__ import annotations

from fusionroute.runtime.errors import InputError
from fusionroute.runtime.expert_memory import check_budget
from fusionroute.runtime.tensorrt.device import Device, Event, Memory, Stream
from fusionroute.runtime.tensorrt.loading import Weights


class Residency:
    """Weights within a byte budget. They are read-only: a pinned copy is made at loading, and evicting copies nothing.

    Raises InputError where the budget does not hold one expert, and on devices that share the host's memory, where
    evicting saves none.
    """

    def __init__(self, device: Device, budget: int):
        if device.integrated:
            raise InputError("This device shares the host's memory, where evicting experts saves nothing: load without expert_memory.")
        self._device, self._budget = device, budget
        self._stream = device.stream()
        self._copies: dict[Weights, tuple[Memory, Event]] = {}  # the pinned copy, and the event of its last restoring
        self._resident: dict[Weights, None] = {}  # the least recently used first

    def adopt(self, weights: Weights) -> None:
        """Copy weights that were just loaded to pinned memory and evict them; they are restored at first use."""
        check_budget(self._budget, weights.size)
        memory = self._device.pinned(weights.size)
        weights.save(memory, self._stream)
        weights.unload(self._stream)
        self._copies[weights] = memory, self._device.event()

    def bring(self, weights: Weights, reader: Stream, idle: Event) -> None:
        """Restore weights, where they are not resident, before later work of `reader`, the only stream that uses them.

        `idle` is reached when no expert runs.
        """
        if weights in self._resident:  # their only reader has waited for them before
            del self._resident[weights]
        else:
            while sum(other.size for other in self._resident) + weights.size > self._budget:
                victim = next(iter(self._resident))
                del self._resident[victim]
                self._stream.wait(idle)
                victim.unload(self._stream)
            memory, ready = self._copies[weights]
            weights.restore(memory, self._stream)
            self._stream.record(ready)
            reader.wait(ready)
        self._resident[weights] = None
