"""Which checks run, and in which order: the most telling first, and later ones use what earlier ones built.

Each check's module is imported when it runs, so that a missing package skips no other check.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

from benchmarks.gpu_check.budget import Budget
from benchmarks.gpu_check.outcome import PASSED, SKIPPED, Finding, Outcome, run_check
from benchmarks.gpu_check.setup import Setup
from fusionroute.runtime.manifest import Manifest
from fusionroute.runtime.tensorrt.library import MODULES, NAMES, TARGET

NO_GPU = "there is no NVIDIA GPU on this machine"
CUDA_TARGET = "ort:cuda"
ON_ENGINES = {
    "parity": "logits.parity",
    "same tokens": "texts.same_tokens",
    "graph replay": "texts.graph_replay",
    "eviction": "texts.eviction",
    "weights once": "engines.weights_once",
}


def later(place: str) -> Callable[..., Finding]:
    """A check by its module and name, imported when it is called."""
    module, name = place.split(".")

    def check(*arguments: object) -> Finding:
        finding: Finding = getattr(import_module(f"benchmarks.gpu_check.{module}"), name)(*arguments)
        return finding

    return check


def run_all(bundles: Sequence[Path], flavours: Sequence[str], gpu: int | None, budget: Budget, out: Path) -> Iterator[Outcome]:
    """All checks of all bundles with every library of `flavours`; a missing library gives one skipped outcome."""
    yield from check_device(gpu, budget)
    for folder in bundles:
        yield from check_onnx_runtime(folder, gpu, budget)
    for folder in bundles:
        for flavour in flavours:
            yield from check_library(Setup(folder, flavour, gpu), budget)
    for flavour in sorted(MODULES.keys() - set(flavours)):
        install = f"pip install 'fusionroute[{flavour}]'"
        says = f"{NAMES[flavour]} is not installed or does not load ({install})"
        yield Outcome("build", f"all, {NAMES[flavour]}", SKIPPED, says)
    for folder in bundles:
        yield from profile(folder, gpu, budget)
    if gpu is not None:
        yield run_check(
            "real size", "random models of 2B, bf16, ONNX Runtime on CUDA", partial(later("real_size.random_2b"), budget, out), budget
        )
    for folder in bundles:
        yield from check_on_cpu(folder, budget)


def check_device(gpu: int | None, budget: Budget) -> Iterator[Outcome]:
    """The device itself, and the runtime's own code on it."""
    if gpu is None:
        yield Outcome("device, copies, CUDA, stream orders", "the GPU", SKIPPED, NO_GPU)
        return
    yield run_check("device", "the GPU", later("facts.facts"), budget)
    yield run_check("copies", "the GPU", later("facts.copies"), budget)
    tests = later("cuda_tests.run_tests")
    yield run_check("CUDA", "memory, streams, events, graphs", partial(tests, budget, "test_device.py"), budget)
    yield run_check("stream orders", "engines stood in for by graphs on the host", partial(tests, budget, "test_engines.py"), budget)


def check_onnx_runtime(folder: Path, gpu: int | None, budget: Budget) -> Iterator[Outcome]:
    """A bundle on ONNX Runtime's CUDA provider."""
    variants = [variant for variant in Manifest.read(folder).variants if variant.target == CUDA_TARGET]
    if gpu is None or not variants:
        reason = NO_GPU if gpu is None else f"the bundle has nothing for {CUDA_TARGET}"
        yield Outcome("parity, speed", f"{folder.name}, ONNX Runtime on CUDA", SKIPPED, reason)
        return
    for variant in variants:
        subject = f"{folder.name} {variant.precision}, ONNX Runtime on CUDA"
        yield run_check("parity", subject, partial(later("ort_cuda.parity"), folder, variant), budget)
    yield run_check("speed", f"{folder.name}, ONNX Runtime on CUDA", partial(later("ort_cuda.speed"), folder), budget)


def profile(folder: Path, gpu: int | None, budget: Budget) -> Iterator[Outcome]:
    """One bundle's decoding step, kernel by kernel."""
    precisions = [variant.precision for variant in Manifest.read(folder).variants if variant.target == CUDA_TARGET]
    if gpu is not None and precisions:
        subject = f"{folder.name} {precisions[0]}, ONNX Runtime on CUDA"
        yield run_check("profile", subject, partial(later("decode_profile.profile"), folder, precisions[0]), budget)


def check_library(setup: Setup, budget: Budget) -> Iterator[Outcome]:
    """All checks of one bundle with one library."""
    bundle, library = setup.folder.name, NAMES[setup.flavour]
    for variant in setup.variants():
        subject = f"{bundle} {variant.precision}, {library}"
        built = run_check("build", subject, partial(later("engines.build"), setup, variant), budget)
        yield built
        if setup.gpu is None or built.status != PASSED:
            reason = NO_GPU if setup.gpu is None else "there are no engines"
            yield Outcome(", ".join(ON_ENGINES), subject, SKIPPED, reason)
            continue
        for name, place in ON_ENGINES.items():
            yield run_check(name, subject, partial(later(place), setup, variant), budget)
    yield run_check("benchmark", f"{bundle}, {library}", partial(later("speed.on_gpu"), setup), budget)


def check_on_cpu(folder: Path, budget: Budget) -> Iterator[Outcome]:
    """What needs no GPU: the graphs for TensorRT on ONNX Runtime, and the CPU's speed."""
    for variant in Manifest.read(folder).variants:
        if variant.target == TARGET:
            subject = f"{folder.name} {variant.precision}, ONNX Runtime"
            yield run_check("graphs", subject, partial(later("logits.graphs"), folder, variant), budget)
    yield run_check("benchmark", f"{folder.name}, CPU precisions", partial(later("speed.on_cpu"), folder), budget)
