"""Engines are built for this GPU, or for others where there is none, and their weights are in its memory only once."""

import time

from benchmarks.gpu_check.outcome import Finding, Skipped
from benchmarks.gpu_check.setup import Setup, same_variant
from fusionroute.runtime.errors import UnavailableError
from fusionroute.runtime.manifest import Variant
from fusionroute.runtime.tensorrt.device import Device
from fusionroute.runtime.tensorrt.engines import rebuild

RTX_SMS = (86, 89, 120)  # what TensorRT-RTX builds for where there is no GPU: RTX 30, 40 and 50
SMALLEST = 256 << 20  # bytes; memory taken beside smaller engines says nothing about copies of their weights
ONE_COPY = 1.5  # times the engines' bytes: more means a second copy of the weights


def build(setup: Setup, variant: Variant) -> Finding:
    """Build engines. Those in the bundle that fit this GPU are kept."""
    if variant.precision == "fp32" and "Attention" in variant.operators:
        raise Skipped("TensorRT has no fused attention in fp32")
    if setup.gpu is None and setup.flavour == "tensorrt":
        raise Skipped("TensorRT builds for the GPU it runs on, and there is none")
    sms = RTX_SMS if setup.gpu is None else (setup.gpu,)
    manifest, seconds = setup.manifest(), 0.0
    try:
        engines = setup.engines(variant, sms[0])
    except UnavailableError:
        start = time.perf_counter()
        manifest = rebuild(setup.folder, [same_variant(manifest, variant)], manifest, setup.flavour, sms, None, lambda _: lambda _: None)
        seconds = time.perf_counter() - start
        engines = same_variant(manifest, variant).engines[-1]
    sizes = {name: manifest.files[path].bytes for name, path in engines.engines.items()}
    devices = ", ".join(f"sm{sm}" for sm in engines.sms)
    origin = f"built in {seconds:.1f} s" if seconds else "already in the bundle"
    says = f"{len(sizes)} engines for {devices}, {sum(sizes.values()) / 1e6:.1f} MB, {origin}"
    return Finding(True, says, {"bytes": sizes, "seconds": seconds})


def weights_once(setup: Setup, variant: Variant) -> Finding:
    """Loading takes the device memory of one copy of the engines' weights, not of two."""
    files = setup.manifest().files
    size = sum(files[path].bytes for path in setup.engines(variant, setup.gpu).engines.values())
    device = Device()
    free = device.free_memory()
    with setup.runtime(variant.precision):
        taken = free - device.free_memory()
    figures = {"engines": size, "device_memory": taken}
    says = f"loading engines of {size / 1e6:.1f} MB takes {taken / 1e6:.1f} MB of device memory"
    if size < SMALLEST:
        raise Skipped(f"{says}: too small to tell how often the weights stand there; take a larger system with BUNDLE=…")
    return Finding(taken < ONE_COPY * size, f"{says}, {taken / size:.2f} times as much", figures)
