"""What the device is, and how fast it copies: the ceilings that all other figures are held against."""

import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.gpu_check.outcome import Finding, Skipped
from fusionroute.runtime.bench.bandwidth import of_device
from fusionroute.runtime.errors import UnavailableError
from fusionroute.runtime.tensorrt.device import Device

QUERY = (
    "name,driver_version,compute_cap,memory.total,memory.free,power.limit,clocks.max.sm,clocks.max.mem,pcie.link.gen.max,ecc.mode.current"
)
COPIED = 64 << 20  # bytes in one copy between host and device
TRIES = 10


def open_device() -> Device:
    """The device, current in this thread. Raises Skipped without one."""
    try:
        device = Device()
    except UnavailableError as error:
        raise Skipped(str(error)) from error
    device.enter()
    return device


def facts() -> Finding:
    """The device's names and sizes, as its driver tells them."""
    device = open_device()
    figures: dict[str, Any] = {"compute_capability": device.sm, "integrated": device.integrated, "free_memory": device.free_memory()}
    figures["driver"] = device.call("cudaDriverGetVersion")
    if tool := shutil.which("nvidia-smi"):
        command = [tool, f"--query-gpu={QUERY}", "--format=csv,noheader,nounits", "-i", "0"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()
        figures |= dict(zip(QUERY.split(","), (part.strip() for part in answer.split(",")), strict=False))
    name = figures.get("name", "a GPU")
    free = figures["free_memory"] / 1e9
    return Finding(True, f"{name}, compute capability {device.sm / 10:.1f}, {free:.1f} GB free, CUDA {figures['driver']}", figures)


def copies() -> Finding:
    """Bytes per second within the device's memory, and between host and device."""
    device = open_device()
    inside = of_device(device).bytes_per_second
    memory, pinned, stream, done = device.memory(COPIED), device.pinned(COPIED), device.stream(), device.event()

    def rate(copy: Callable[[], None]) -> float:
        best = float("inf")
        for _ in range(TRIES):
            start = time.perf_counter()
            copy()
            stream.record(done)
            done.wait()
            best = min(best, time.perf_counter() - start)
        return COPIED / best

    pageable = np.zeros(COPIED, np.uint8)
    up = rate(lambda: stream.upload(memory.address, pinned.address, COPIED))
    down = rate(lambda: stream.download(pinned.address, memory.address, COPIED))
    from_pageable = rate(lambda: stream.upload(memory.address, pageable.ctypes.data, COPIED))
    figures = {"within": inside, "up": up, "down": down, "up_from_pageable": from_pageable}
    says = (
        f"within the device {inside / 1e9:.0f} GB/s read and written; up {up / 1e9:.1f}, down {down / 1e9:.1f} GB/s from pinned memory, "
        f"up {from_pageable / 1e9:.1f} GB/s from other memory"
    )
    return Finding(True, says, figures)
