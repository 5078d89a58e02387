"""The table of devices: a new backend is one new file and one line here."""

from runtime.backends.backend import Backend
from runtime.backends.ort_cpu import TARGET as ORT_CPU
from runtime.backends.ort_cpu import OrtCpu
from runtime.bundle import Bundle
from runtime.errors import InputError, UnavailableError

DEVICES = {"cpu": (ORT_CPU, OrtCpu)}
KNOWN = ("auto", "cpu", "cuda", "tensorrt", "rtx")


def open_backend(bundle: Bundle, precision: str | None, device: str, threads: int | None) -> tuple[Backend, str]:
    """Load a bundle's models on a device; returns the backend and the precision chosen.

    Raises InputError for an unknown device, UnavailableError for one that the bundle or this version does not serve.
    """
    if device not in KNOWN:
        raise InputError(f"Unknown device '{device}': use one of {', '.join(KNOWN)}.")
    name = "cpu" if device == "auto" else device
    if name not in DEVICES:
        raise UnavailableError(f"This version has no {name} backend yet: use device='cpu'.")
    target, backend = DEVICES[name]
    variant = bundle.variant(target, precision)
    return backend(bundle, variant, threads), variant.precision


__all__ = ["DEVICES", "Backend", "open_backend"]
