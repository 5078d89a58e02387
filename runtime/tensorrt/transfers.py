"""Small blocks that travel between host and device: copied on a stream of their own, or mapped in shared memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from fusionroute.runtime.tensorrt.device import Device, Event, Stream, aligned

Layout = Mapping[str, tuple[tuple[int, ...], Any]]  # name → shape, dtype


class Block:
    """Named arrays in one range of pinned host memory, and their addresses on the device.

    `arrays` are the host's views. `event` is reached when the last transfer is over; `number` is that transfer's (see
    Copies).
    """

    def __init__(self, device: Device, layout: Layout):
        offsets, size = {}, 0
        for name, (shape, dtype) in layout.items():
            offsets[name] = size
            size += aligned(int(np.prod(shape)) * np.dtype(dtype).itemsize)
        self.size = size
        self.pinned = device.pinned(size)
        self._memory = None if device.integrated else device.memory(size)
        start = device.mapped(self.pinned) if self._memory is None else self._memory.address
        self.device = start
        self.addresses = {name: start + offset for name, offset in offsets.items()}
        self.arrays: dict[str, np.ndarray] = {
            name: host_array(self.pinned.address + offsets[name], shape, dtype) for name, (shape, dtype) in layout.items()
        }
        self.event = device.event()
        self.number = 0


def host_array(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """A numpy view of host memory; the owner of the memory must outlive it."""
    count = int(np.prod(shape))
    raw = (ctypes.c_byte * (count * np.dtype(dtype).itemsize)).from_address(address)
    return np.frombuffer(raw, dtype, count).reshape(shape)


class Transfers(Protocol):
    """How blocks travel.

    The host writes a block's arrays only after `settle`, and reads them only after `download` and `settle`.
    """

    def upload(self, block: Block, reader: Stream | None, free: Event | None = None) -> None:
        """Let later work of `reader` see what the host wrote. None: its readers wait for a later upload instead, and
        nobody settles the block.

        `free` is reached when the device no longer reads what the block held before; None: that was waited for.
        """
        ...

    def download(self, block: Block, ready: Event | None) -> None:
        """Let the host see what the device wrote before `ready`; None: that was waited for."""
        ...

    def settle(self, block: Block) -> None:
        """Block the calling thread until the block's last transfer is over."""
        ...

    def release(self, blocks: Iterable[Block], done: Event, read: Event) -> None:
        """Wait until blocks may be freed that the device last wrote before `done` and last read before `read`."""
        ...


class Copies:
    """Copies on one stream. They end in order: after a wait for one of them, waits for earlier ones cost nothing."""

    def __init__(self, device: Device):
        self.stream = device.stream()
        self._sent = self._over = 0

    def upload(self, block: Block, reader: Stream | None, free: Event | None = None) -> None:
        """See `Transfers`."""
        if free is not None:
            self.stream.wait(free)
        self.stream.upload(block.device, block.pinned.address, block.size)
        if reader is not None:
            self._mark(block)
            reader.wait(block.event)

    def download(self, block: Block, ready: Event | None) -> None:
        """See `Transfers`."""
        if ready is not None:
            self.stream.wait(ready)
        self.stream.download(block.pinned.address, block.device, block.size)
        self._mark(block)

    def _mark(self, block: Block) -> None:
        self.stream.record(block.event)
        self._sent += 1
        block.number = self._sent

    def settle(self, block: Block) -> None:
        """See `Transfers`."""
        number = block.number
        if number > self._over:
            block.event.wait()
            self._over = max(self._over, number)

    def release(self, blocks: Iterable[Block], done: Event, read: Event) -> None:
        """See `Transfers`."""
        for block in blocks:
            self.settle(block)
        done.wait()
        read.wait()


class Mapped:
    """Host and device share memory: nothing is copied, but neither may touch a block while the other uses it."""

    def upload(self, block: Block, reader: Stream | None, free: Event | None = None) -> None:
        """See `Transfers`. The block is in use until `free` is reached again, which its reader records."""
        if free is not None:
            block.event = free

    def download(self, block: Block, ready: Event | None) -> None:
        """See `Transfers`."""
        if ready is not None:
            block.event = ready

    def settle(self, block: Block) -> None:
        """See `Transfers`."""
        block.event.wait()

    def release(self, blocks: Iterable[Block], done: Event, read: Event) -> None:
        """See `Transfers`."""
        done.wait()
        read.wait()
