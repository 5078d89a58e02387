"""This machine as a device: its memory, and how fast it reads it, which is measured."""

from __future__ import annotations

from contextlib import suppress

import psutil

from fusionroute.runtime.backends.ort_cpu import TARGET as CPU
from fusionroute.runtime.bench import bandwidth
from fusionroute.runtime.bench.memory import available
from fusionroute.runtime.errors import FusionError
from fusionroute.runtime.machine import cores, processor
from fusionroute.runtime.plan.devices import THIS, Device
from fusionroute.runtime.plan.measurements import WITH_VNNI
from fusionroute.runtime.tensorrt import device as cuda

# bytes/s at which evicted experts come back: a processor packs them again, which was measured (docs/runtime.md); the link of
# a GPU is an assumption
PACKING, FROM_HOST = 0.7e9, 12e9


def this_machine() -> Device:
    """Its GPU, where CUDA answers, else its processor."""
    with suppress(FusionError):
        gpu = cuda.Device()
        free = gpu.free_memory()
        target = "tensorrt" if gpu.integrated else f"rtx:sm{gpu.sm}"
        speed = bandwidth.of_device(gpu).bytes_per_second
        return Device(
            THIS, f"this machine's GPU (SM{gpu.sm})", free, speed, gpu.integrated, target, 0, FROM_HOST, "measured",
            "what is free now", sm=gpu.sm,
        )  # fmt: skip
    total = int(psutil.virtual_memory().total)
    speed = bandwidth.of_host().bytes_per_second
    has_vnni = any("vnni" in line for line in processor())
    return Device(
        THIS, "this machine's processor", total, speed, True, CPU, total - available(), PACKING, "measured", "what is taken now",
        WITH_VNNI if has_vnni else "cpu", cores(),
    )  # fmt: skip
