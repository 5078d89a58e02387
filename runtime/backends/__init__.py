"""The table of devices: a new backend is one new file and one line here."""

import logging
from collections.abc import Callable
from typing import Any

from runtime.backends import ort_cpu
from runtime.backends.backend import Backend
from runtime.bundle import Bundle
from runtime.errors import InputError, one_line
from runtime.tensorrt.library import device_sm

Opened = Callable[[Bundle, Any, int | None, int | None], Backend]  # (bundle, variant, threads, expert_memory)
LOG = logging.getLogger("fusionroute")


def open_cpu(bundle: Bundle, variant: Any, threads: int | None, expert_memory: int | None) -> Backend:
    """ONNX Runtime on the CPU."""
    refuse_budget(expert_memory)
    return ort_cpu.OrtCpu(bundle, variant, threads)


def refuse_budget(expert_memory: int | None) -> None:
    """Raise InputError for a budget where weights cannot leave the device."""
    if expert_memory is not None:
        raise InputError("expert_memory is a limit on device memory: use it with device='tensorrt' or 'rtx'.")


def open_engines(flavour: str) -> Opened:
    """TensorRT or TensorRT-RTX; its modules are read when one is opened."""

    def opened(bundle: Bundle, variant: Any, threads: int | None, expert_memory: int | None) -> Backend:
        from runtime.tensorrt.backend import TensorRt

        return TensorRt(bundle, variant, flavour, expert_memory)

    return opened


def open_provider(name: str) -> Opened:
    """ONNX Runtime with one of its GPU providers; its modules are read when one is opened."""

    def opened(bundle: Bundle, variant: Any, threads: int | None, expert_memory: int | None) -> Backend:
        from runtime.backends.ort_gpu import OrtGpu
        from runtime.backends.providers import PROVIDERS

        refuse_budget(expert_memory)
        return OrtGpu(bundle, variant, PROVIDERS[name])

    return opened


DEVICES = {
    "cpu": (ort_cpu.TARGET, open_cpu),
    "cuda": ("ort:cuda", open_provider("cuda")),
    "tensorrt": ("tensorrt", open_engines("tensorrt")),
    "rtx": ("tensorrt", open_engines("rtx")),
    "ort-tensorrt": ("tensorrt", open_provider("ort-tensorrt")),
    "ort-rtx": ("tensorrt", open_provider("ort-rtx")),
}
KNOWN = ("auto", *DEVICES)
AUTOMATIC = ("tensorrt", "rtx", "cuda")  # what `auto` tries where there is a GPU, before the CPU


def open_backend(
    bundle: Bundle, precision: str | None, device: str, threads: int | None, expert_memory: int | None = None
) -> tuple[Backend, str]:
    """Load a bundle's models on a device; returns the backend and the precision chosen.

    `auto` takes the first that works: engines of the bundle that fit this machine, ONNX Runtime on CUDA, the CPU. What it passes over is logged.
    Raises InputError for an unknown device, UnavailableError for one that the bundle or this machine does not serve.
    """
    if device not in KNOWN:
        raise InputError(f"Unknown device '{device}': use one of {', '.join(KNOWN)}.")
    if device == "auto":
        if (found := on_gpu(bundle, precision, threads, expert_memory)) is not None:
            return found
        device = "cpu"
    target, opened = DEVICES[device]
    variant = bundle.variant(target, precision)
    return opened(bundle, variant, threads, expert_memory), variant.precision


def on_gpu(bundle: Bundle, precision: str | None, threads: int | None, expert_memory: int | None) -> tuple[Backend, str] | None:
    """The first GPU backend that opens a variant of the bundle, the fastest precision first; None without one. Raises nothing."""
    for device in AUTOMATIC if device_sm() is not None else ():
        target, opened = DEVICES[device]
        for variant in bundle.variants(target):
            if precision in (None, variant.precision):
                try:
                    return opened(bundle, variant, threads, expert_memory), variant.precision
                except Exception as error:  # a broken driver or library must not keep the CPU from working
                    LOG.warning("device='auto' passes %s in %s over: %s", device, variant.precision, one_line(error))
    return None


__all__ = ["DEVICES", "KNOWN", "Backend", "open_backend"]
