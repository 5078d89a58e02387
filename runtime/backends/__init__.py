"""The table of devices: a new backend is one new file and one line here."""

from collections.abc import Callable
from typing import Any

from runtime.backends import ort_cpu
from runtime.backends.backend import Backend
from runtime.bundle import Bundle
from runtime.errors import InputError, UnavailableError


def open_cpu(bundle: Bundle, variant: Any, threads: int | None, expert_memory: int | None) -> Backend:
    """ONNX Runtime on the CPU."""
    if expert_memory is not None:
        raise InputError("expert_memory is a limit on device memory: use it with device='tensorrt' or 'rtx'.")
    return ort_cpu.OrtCpu(bundle, variant, threads)


def open_engines(flavour: str) -> Callable[[Bundle, Any, int | None, int | None], Backend]:
    """TensorRT or TensorRT-RTX; its modules are read when one is opened."""

    def opened(bundle: Bundle, variant: Any, threads: int | None, expert_memory: int | None) -> Backend:
        from runtime.tensorrt.backend import TensorRt

        return TensorRt(bundle, variant, flavour, expert_memory)

    return opened


DEVICES = {
    "cpu": (ort_cpu.TARGET, open_cpu),
    "tensorrt": ("tensorrt", open_engines("tensorrt")),
    "rtx": ("tensorrt", open_engines("rtx")),
}
KNOWN = ("auto", "cpu", "cuda", "tensorrt", "rtx")


def open_backend(
    bundle: Bundle, precision: str | None, device: str, threads: int | None, expert_memory: int | None = None
) -> tuple[Backend, str]:
    """Load a bundle's models on a device; returns the backend and the precision chosen.

    Raises InputError for an unknown device, UnavailableError for one that the bundle or this version does not serve.
    """
    target, opened = DEVICES[resolved(device)]
    variant = bundle.variant(target, precision)
    return opened(bundle, variant, threads, expert_memory), variant.precision


def resolved(device: str) -> str:
    """The key in DEVICES of a device as users name it. Raises InputError for an unknown one, UnavailableError for one without a backend."""
    if device not in KNOWN:
        raise InputError(f"Unknown device '{device}': use one of {', '.join(KNOWN)}.")
    name = "cpu" if device == "auto" else device
    if name not in DEVICES:
        raise UnavailableError(f"This version has no {name} backend yet: use device='cpu'.")
    return name


__all__ = ["DEVICES", "Backend", "open_backend"]
