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


ENGINES_OF = ("tensorrt", "tensorrt:10.3")
DEVICES = {  # name → targets that it serves, the best first
    "cpu": ((ort_cpu.TARGET,), open_cpu),
    "tensorrt": (ENGINES_OF, open_engines("tensorrt")),
    "rtx": (ENGINES_OF, open_engines("rtx")),
}
KNOWN = ("auto", "cpu", "cuda", "tensorrt", "rtx")


def open_backend(
    bundle: Bundle, precision: str | None, device: str, threads: int | None, expert_memory: int | None = None
) -> tuple[Backend, str]:
    """Load a bundle's models on a device; returns the backend and the precision chosen.

    Raises InputError for an unknown device, UnavailableError for one that the bundle or this version does not serve.
    """
    if device not in KNOWN:
        raise InputError(f"Unknown device '{device}': use one of {', '.join(KNOWN)}.")
    name = "cpu" if device == "auto" else device
    if name not in DEVICES:
        raise UnavailableError(f"This version has no {name} backend yet: use device='cpu'.")
    targets, opened = DEVICES[name]
    variant = choose(bundle, targets, precision, name)
    return opened(bundle, variant, threads, expert_memory), variant.precision


def choose(bundle: Bundle, targets: tuple[str, ...], precision: str | None, device: str) -> Any:
    """The variant to open: of the first target that has engines for the device, else of the first that the bundle has.

    Raises UnavailableError where it has none.
    """
    served = [variant for variant in bundle.manifest.variants if variant.target in targets and precision in (None, variant.precision)]
    served.sort(key=lambda variant: (not any(built.flavour == device for built in variant.engines), targets.index(variant.target)))
    return bundle.variant(served[0].target if served else targets[0], precision)


__all__ = ["DEVICES", "Backend", "open_backend"]
