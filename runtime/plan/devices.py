"""Devices that a plan can be made for: their memory, its speed, and what a bundle for them is exported as."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Literal

from fusionroute.runtime.errors import InputError
from fusionroute.runtime.plan.data_files import read
from fusionroute.runtime.tensorrt.library import TARGET as TENSORRT

Kind = Literal["gpu", "cpu", "cpu with VNNI"]

THIS = "this"
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}
SHARE_RESERVED = 0.1  # of the memory of a device that nobody described


@dataclass(frozen=True)
class Device:
    """memory: bytes, of which the system takes `reserved`. bandwidth: bytes/s that its memory is specified for, or was
    measured at. unified: whether host and GPU share the memory. export: the target to export for. link: bytes/s at
    which weights of evicted experts come back. kind: whose measurements tell how fast it is. cores: of a
    processor. sm: compute capability of a GPU (89 for SM89); None: not known.
    """

    name: str
    title: str
    memory: int
    bandwidth: float
    unified: bool
    export: str
    reserved: int
    link: float
    source: str
    reserved_source: str
    kind: Kind = "gpu"
    cores: int = 2
    sm: int | None = None

    @property
    def free(self) -> int:
        """Bytes that a bundle may take."""
        return max(self.memory - self.reserved, 0)

    @property
    def target(self) -> str:
        """The target of its graphs, as manifests name it."""
        return TENSORRT if self.export.startswith(("rtx", "tensorrt")) else self.export


def devices() -> dict[str, Device]:
    """All known devices by name."""
    names = [field.name for field in fields(Device) if field.name not in ("kind", "cores")]
    return {entry["name"]: Device(**{name: entry[name] for name in names}) for entry in read("devices")["devices"]}


def device_named(name: str) -> Device:
    """A known device. Raises InputError, which lists them."""
    known = devices()
    if name not in known:
        raise InputError(f"Unknown target '{name}': use one of {', '.join(known)}, {THIS}, or --device-memory with --bandwidth.")
    return known[name]


def described(memory: str, bandwidth: float) -> Device:
    """A GPU with that much memory, such as 8GiB, at `bandwidth` in GB/s. Raises InputError."""
    size = parsed_bytes(memory)
    if not 0 < bandwidth < 1e5:
        raise InputError(f"A bandwidth of {bandwidth:g} GB/s is impossible: give GB/s as the maker does, such as 68 or 1008.")
    return Device(
        "described", f"a GPU with {memory} at {bandwidth:g} GB/s", size, bandwidth * 1e9, False, "tensorrt",
        int(SHARE_RESERVED * size), 12e9, "as given", f"{SHARE_RESERVED:.0%} of the memory, an assumption",
    )  # fmt: skip


def parsed_bytes(text: str) -> int:
    """Bytes from a number with a unit: 8GiB, 8GB, 8192MiB. Raises InputError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    size = int(float(match[1]) * UNITS[match[2] or ""]) if match else 0
    if size < 1 << 20:
        raise InputError(f"'{text}' is no size of a device's memory: give a number with a unit, such as 8GiB.")
    return size
