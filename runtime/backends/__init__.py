"""The table of devices: a new backend is one new file and one line in `DEVICES`.

Backends for GPUs are imported when one is opened: they import pydantic, which would double the time of importing the
runtime.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fusionroute.runtime.arguments import shown
from fusionroute.runtime.backend import Backend, BackendOptions
from fusionroute.runtime.backends import ort_cpu, ort_pair
from fusionroute.runtime.backends.mapped_factors import factors_of
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.errors import InputError, UnavailableError, one_line
from fusionroute.runtime.tensorrt.library import OLDER, TARGET, device_sm

if TYPE_CHECKING:
    from fusionroute.runtime.manifest import Variant

Open = Callable[[Bundle, "Variant", BackendOptions], Backend]
LOG = logging.getLogger("fusionroute")


def open_cpu(bundle: Bundle, variant: Variant, options: BackendOptions) -> Backend:
    """ONNX Runtime on the CPU: a graph per model, or one for all of them."""
    if variant.pair is not None:
        refuse_expert_memory(options)
        return ort_pair.OrtPair(bundle, variant, variant.pair, options.threads, share_weights=options.share_weights, exact=options.exact)
    return ort_cpu.OrtCpu(bundle, variant, options.threads, share_weights=options.share_weights, expert_memory=options.expert_memory)


def open_engines(flavour: str) -> Open:
    """A function that opens engines of TensorRT or TensorRT-RTX."""

    def open_flavour(bundle: Bundle, variant: Variant, options: BackendOptions) -> Backend:
        from fusionroute.runtime.tensorrt.backend import TensorRt
        from fusionroute.runtime.tensorrt.pair import TensorRtPair

        if variant.pair is not None:
            factors = factors_of(bundle, variant.pair.factors)
            return TensorRtPair(bundle, variant, variant.pair, factors, flavour, options.expert_memory)
        return TensorRt(bundle, variant, flavour, options.expert_memory)

    return open_flavour


def open_provider(name: str) -> Open:
    """A function that opens ONNX Runtime with one of its GPU providers."""

    def open_named(bundle: Bundle, variant: Variant, options: BackendOptions) -> Backend:
        from fusionroute.runtime.backends.ort_gpu import OrtGpu
        from fusionroute.runtime.backends.ort_gpu_pair import OrtGpuPair
        from fusionroute.runtime.backends.providers import PROVIDERS

        if variant.pair is not None:
            refuse_expert_memory(options)
            return OrtGpuPair(bundle, variant, variant.pair, PROVIDERS[name])
        return OrtGpu(bundle, variant, PROVIDERS[name], options.expert_memory)

    return open_named


ENGINE_TARGETS = (TARGET, OLDER)
# name → the targets that it runs, the best first, and the function that opens it
DEVICES: dict[str, tuple[tuple[str, ...], Open]] = {
    "cpu": ((ort_cpu.TARGET,), open_cpu),
    "cuda": (("ort:cuda",), open_provider("cuda")),
    "tensorrt": (ENGINE_TARGETS, open_engines("tensorrt")),
    "rtx": (ENGINE_TARGETS, open_engines("rtx")),
    "ort-tensorrt": ((TARGET,), open_provider("ort-tensorrt")),
    "ort-rtx": ((TARGET,), open_provider("ort-rtx")),
}
EXPORTED_AS = {"rtx": "rtx"}  # devices whose engines --target builds under another name than that of their graphs
ON_CPU, ALSO_FOR_CPU = "use device='cpu'", "export the bundle for the CPU too (--target ort:cpu)"
KNOWN = ("auto", *DEVICES)
AUTOMATIC = ("tensorrt", "rtx", "cuda")  # what `auto` tries where there is a GPU, before the CPU


def open_backend(bundle: Bundle, options: BackendOptions) -> tuple[Backend, Variant]:
    """Load a bundle's models on a device; returns the backend and the variant that was opened.

    `auto` takes the first that works: engines of the bundle that fit this machine, ONNX Runtime on CUDA, the CPU.
    Devices that fail are logged. Raises InputError for an unknown device or options that it does not take,
    UnavailableError for a device that the bundle or this machine does not have.
    """
    device = options.device
    check_device(device)
    if options.share_weights:
        if device not in ("auto", "cpu"):
            raise InputError(f"share_weights=True is for the host's memory: use it with device='cpu', not '{device}'.")
    elif device == "auto" and (opened := open_on_gpu(bundle, options)) is not None:
        return opened
    device = "cpu" if device == "auto" else device
    targets, open_device = DEVICES[device]
    variant = choose(bundle, targets, options.precision, device)
    with advising(bundle):
        return open_device(bundle, variant, options), variant


@contextmanager
def advising(bundle: Bundle) -> Iterator[None]:
    """Let no error of a device send to the CPU where the bundle has no graphs for it."""
    try:
        yield
    except UnavailableError as error:
        if bundle.variants(ort_cpu.TARGET) or ON_CPU not in str(error):
            raise
        raise UnavailableError(str(error).replace(ON_CPU, ALSO_FOR_CPU)) from error


def check_device(device: str) -> None:
    """Raise InputError for the name of a device that is not in the table."""
    if device not in KNOWN:
        raise InputError(f"Unknown device {shown(device)}: use one of {', '.join(KNOWN)}.")


def refuse_expert_memory(options: BackendOptions) -> None:
    """Raise InputError for a limit on experts' memory: called where they all stay, as factors of one base do."""
    if options.expert_memory is not None:
        raise InputError("expert_memory is for experts that can leave, and this device keeps all experts of this bundle: leave it out.")


def resolved(bundle: Bundle, device: str) -> str:
    """The key in DEVICES for a device's name; for `auto`, this machine's first device that the bundle serves.

    Raises InputError for an unknown name.
    """
    check_device(device)
    if device != "auto":
        return device
    gpu_devices = AUTOMATIC if device_sm() is not None else ()
    return next((name for name in gpu_devices if any(bundle.variants(target) for target in DEVICES[name][0])), "cpu")


def open_on_gpu(bundle: Bundle, options: BackendOptions) -> tuple[Backend, Variant] | None:
    """The first GPU backend that opens a variant of the bundle, the fastest precision first; None without one.

    Raises nothing.
    """
    for device in AUTOMATIC if device_sm() is not None else ():
        targets, open_device = DEVICES[device]
        for variant in (variant for target in targets for variant in bundle.variants(target)):
            if options.precision in (None, variant.precision):
                try:
                    return open_device(bundle, variant, options), variant
                except Exception as error:  # a broken driver or library must not keep the CPU from working
                    LOG.warning("device='auto' passes %s in %s over: %s", device, variant.precision, one_line(error))
    return None


def choose(bundle: Bundle, targets: tuple[str, ...], precision: str | None, device: str) -> Variant:
    """The variant to open: of the first target that has engines for the device, else of the first that the bundle has.

    Raises UnavailableError where it has none.
    """
    served = [variant for variant in bundle.manifest.variants if variant.target in targets and precision in (None, variant.precision)]
    served.sort(key=lambda variant: (not any(built.flavour == device for built in variant.engines), targets.index(variant.target)))
    return bundle.variant(served[0].target if served else targets[0], precision, EXPORTED_AS.get(device))


__all__ = ["DEVICES", "KNOWN", "Backend", "BackendOptions", "advising", "check_device", "choose", "open_backend", "resolved"]
