"""Which experts' weights are on the device, when not all fit a budget: the least recently used makes room, and comes back from pinned memory."""

from __future__ import annotations

from runtime.errors import InputError
from runtime.tensorrt.device import Device, Event, Memory, Stream
from runtime.tensorrt.engines import Weights


class Residency:
    """Weights within a byte budget. They are read-only, so one pinned copy of each is made at loading, and evicting copies nothing.

    Raises InputError where the budget does not hold one expert, and on devices that share the host's memory, where evicting saves none.
    """

    def __init__(self, device: Device, budget: int):
        if device.integrated:
            raise InputError("This device shares the host's memory, where evicting experts saves nothing: load without expert_memory.")
        self._device, self._budget = device, budget
        self._stream = device.stream()
        self._copies: dict[Weights, Memory] = {}
        self._resident: dict[Weights, Event] = {}  # the least recently used first; the event is reached when the weights are there

    def adopt(self, weights: Weights) -> None:
        """Keep a pinned copy of weights just loaded and take them off the device; they come back at first use."""
        if weights.size > self._budget:
            raise InputError(
                f"expert_memory={self._budget} does not hold the {weights.size} bytes of one expert: allow at least as much, or none."
            )
        memory = self._device.pinned(weights.size)
        weights.save(memory, self._stream)
        weights.unload(self._stream)
        self._copies[weights] = memory

    def bring(self, weights: Weights, reader: Stream, idle: Event) -> None:
        """Have weights on the device before later work of `reader`. `idle` is reached when no expert runs any more."""
        if (ready := self._resident.pop(weights, None)) is None:
            while sum(other.size for other in self._resident) + weights.size > self._budget:
                victim = next(iter(self._resident))
                del self._resident[victim]
                self._stream.wait(idle)
                victim.unload(self._stream)
            ready = self._device.event()
            weights.restore(self._copies[weights], self._stream)
            self._stream.record(ready)
            reader.wait(ready)
        self._resident[weights] = ready
