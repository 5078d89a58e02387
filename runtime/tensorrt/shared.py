"""What the models of one backend for TensorRT share."""

from __future__ import annotations

from threading import RLock
from typing import NamedTuple

import numpy as np

from fusionroute.runtime.manifest import Manifest
from fusionroute.runtime.tensorrt.device import Device, Event, Memory
from fusionroute.runtime.tensorrt.transfers import Block, Copies, Mapped, Transfers


class Scratch(NamedTuple):
    """Working memory of engines that never run at the same time.

    `free`: reached when no engine uses it; None where only one stream does.
    """

    memory: Memory
    free: Event | None


class Shared(NamedTuple):
    """What the models of a backend share. `lock` is held while work is queued, never while the host waits for it."""

    device: Device
    transfers: Transfers
    lock: RLock
    capacity: int
    chunk: int
    vocab: int
    key_positions: Block  # int64 0 … capacity − 1; a step reads the beginning

    @classmethod
    def of(cls, device: Device, manifest: Manifest, chunk: int) -> Shared:
        """For the models of a manifest, whose engines read up to `chunk` tokens at a time."""
        keys = Block(device, {"key_positions": ((manifest.max_seq_len,), np.int64)})
        transfers: Transfers = Mapped() if device.integrated else Copies(device)
        return cls(device, transfers, RLock(), manifest.max_seq_len, chunk, manifest.vocab_size, keys)

    def send_key_positions(self) -> None:
        """Fill them. Nobody waits for it: every later upload ends after this one."""
        self.key_positions.arrays["key_positions"][...] = np.arange(self.capacity)
        self.transfers.upload(self.key_positions, None)
