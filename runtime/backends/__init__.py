"""The table of devices: a new backend is one new file and one line here."""

import logging
from collections.abc import Callable
from typing import Any

from fusionroute.runtime.backends import ort_cpu
from fusionroute.runtime.backends.backend import Backend
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.errors import InputError, one_line
from fusionroute.runtime.tensorrt.library import device_sm

Opened = Callable[[Bundle, Any, int | None, int | None], Backend]  # (bundle, variant, threads, expert_memory)
LOG = logging.getLogger("fusionroute")


def open_cpu(bundle: Bundle, variant: Any, threads: int | None, expert_memory: int | None) -> Backend:
    """ONNX Runtime on the CPU."""
    refuse_budget(expert_memory)
    return ort_cpu.OrtCpu(bundle, variant, threads)


def open_shared(bundle: Bundle, precision: str | None, device: str, threads: int | None, expert_memory: int | None) -> tuple[Backend, str]:
    """ONNX Runtime on the CPU on weights that processes share. Raises InputError where that is not to be had."""
    refuse_budget(expert_memory)
    if device not in ("auto", "cpu"):
        raise InputError(f"share_weights=True is for the host's memory: use it with device='cpu', not '{device}'.")
    variant = bundle.variant(ort_cpu.TARGET, precision)
    return ort_cpu.OrtCpu(bundle, variant, threads, share_weights=True), variant.precision


def refuse_budget(expert_memory: int | None) -> None:
    """Raise InputError for a budget where weights cannot leave the device."""
    if expert_memory is not None:
        raise InputError("expert_memory is a limit on device memory: use it with device='tensorrt' or 'rtx'.")


def open_engines(flavour: str) -> Opened:
    """TensorRT or TensorRT-RTX; its modules are read when one is opened."""

    def opened(bundle: Bundle, variant: Any, threads: int | None, expert_memory: int | None) -> Backend:
        from fusionroute.runtime.tensorrt.backend import TensorRt

        return TensorRt(bundle, variant, flavour, expert_memory)

    return opened


def open_provider(name: str) -> Opened:
    """ONNX Runtime with one of its GPU providers; its modules are read when one is opened."""

    def opened(bundle: Bundle, variant: Any, threads: int | None, expert_memory: int | None) -> Backend:
        from fusionroute.runtime.backends.ort_gpu import OrtGpu
        from fusionroute.runtime.backends.providers import PROVIDERS

        refuse_budget(expert_memory)
        return OrtGpu(bundle, variant, PROVIDERS[name])

    return opened


ENGINES_OF = ("tensorrt", "tensorrt:10.3")
DEVICES = {  # name → targets that it serves, the best first
    "cpu": ((ort_cpu.TARGET,), open_cpu),
    "cuda": (("ort:cuda",), open_provider("cuda")),
    "tensorrt": (ENGINES_OF, open_engines("tensorrt")),
    "rtx": (ENGINES_OF, open_engines("rtx")),
    "ort-tensorrt": (("tensorrt",), open_provider("ort-tensorrt")),
    "ort-rtx": (("tensorrt",), open_provider("ort-rtx")),
}
KNOWN = ("auto", *DEVICES)
AUTOMATIC = ("tensorrt", "rtx", "cuda")  # what `auto` tries where there is a GPU, before the CPU


def open_backend(
    bundle: Bundle,
    precision: str | None,
    device: str,
    threads: int | None,
    expert_memory: int | None = None,
    share_weights: bool = False,
) -> tuple[Backend, str]:
    """Load a bundle's models on a device; returns the backend and the precision chosen.

    `auto` takes the first that works: engines of the bundle that fit this machine, ONNX Runtime on CUDA, the CPU. What it passes over is logged.
    Raises InputError for an unknown device, UnavailableError for one that the bundle or this machine does not serve.
    """
    if device not in KNOWN:
        raise InputError(f"Unknown device '{device}': use one of {', '.join(KNOWN)}.")
    if share_weights:
        return open_shared(bundle, precision, device, threads, expert_memory)
    if device == "auto":
        if (found := on_gpu(bundle, precision, threads, expert_memory)) is not None:
            return found
        device = "cpu"
    targets, opened = DEVICES[device]
    variant = choose(bundle, targets, precision, device)
    return opened(bundle, variant, threads, expert_memory), variant.precision


def resolved(bundle: Bundle, device: str) -> str:
    """The key in DEVICES of a device as users name it, and what `auto` tries first here. Raises InputError for an unknown one."""
    if device not in KNOWN:
        raise InputError(f"Unknown device '{device}': use one of {', '.join(KNOWN)}.")
    if device != "auto":
        return device
    there = AUTOMATIC if device_sm() is not None else ()
    return next((name for name in there if any(bundle.variants(target) for target in DEVICES[name][0])), "cpu")


def on_gpu(bundle: Bundle, precision: str | None, threads: int | None, expert_memory: int | None) -> tuple[Backend, str] | None:
    """The first GPU backend that opens a variant of the bundle, the fastest precision first; None without one. Raises nothing."""
    for device in AUTOMATIC if device_sm() is not None else ():
        targets, opened = DEVICES[device]
        for variant in (variant for target in targets for variant in bundle.variants(target)):
            if precision in (None, variant.precision):
                try:
                    return opened(bundle, variant, threads, expert_memory), variant.precision
                except Exception as error:  # a broken driver or library must not keep the CPU from working
                    LOG.warning("device='auto' passes %s in %s over: %s", device, variant.precision, one_line(error))
    return None


def choose(bundle: Bundle, targets: tuple[str, ...], precision: str | None, device: str) -> Any:
    """The variant to open: of the first target that has engines for the device, else of the first that the bundle has.

    Raises UnavailableError where it has none.
    """
    served = [variant for variant in bundle.manifest.variants if variant.target in targets and precision in (None, variant.precision)]
    served.sort(key=lambda variant: (not any(built.flavour == device for built in variant.engines), targets.index(variant.target)))
    return bundle.variant(served[0].target if served else targets[0], precision)


__all__ = ["DEVICES", "KNOWN", "Backend", "choose", "open_backend", "resolved"]
