"""Which checks run on a bundle, and in which order: later ones use what earlier ones built."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from benchmarks.gpu_check import engines, logits, speed, texts
from benchmarks.gpu_check.outcome import PASSED, SKIPPED, Outcome, run_check
from benchmarks.gpu_check.setup import Setup
from fusionroute.runtime.manifest import Manifest
from fusionroute.runtime.tensorrt.library import MODULES, NAMES, TARGET

ON_GPU = {
    "parity": logits.parity,
    "same tokens": texts.same_tokens,
    "graph replay": texts.graph_replay,
    "eviction": texts.eviction,
    "weights once": engines.weights_once,
}


def run_all(bundles: Sequence[Path], flavours: Sequence[str], gpu: int | None) -> Iterator[Outcome]:
    """All checks of all bundles with every library of `flavours`; a missing library gives one skipped outcome."""
    for folder in bundles:
        for variant in Manifest.read(folder).variants:
            if variant.target == TARGET:
                subject = f"{folder.name} {variant.precision}, ONNX Runtime"
                yield run_check("graphs", subject, partial(logits.graphs, folder, variant))
        yield run_check("benchmark", f"{folder.name}, CPU precisions", partial(speed.on_cpu, folder))
        for flavour in flavours:
            yield from check_library(Setup(folder, flavour, gpu))
    for flavour in MODULES.keys() - set(flavours):
        install = f"pip install 'fusionroute[{flavour}]'"
        says = f"{NAMES[flavour]} is not installed or does not load ({install})"
        yield Outcome("build", f"all, {NAMES[flavour]}", SKIPPED, says)


def check_library(setup: Setup) -> Iterator[Outcome]:
    """All checks of one bundle with one library."""
    bundle, library = setup.folder.name, NAMES[setup.flavour]
    for variant in setup.variants():
        subject = f"{bundle} {variant.precision}, {library}"
        built = run_check("build", subject, partial(engines.build, setup, variant))
        yield built
        if setup.gpu is None or built.status != PASSED:
            reason = "there is no NVIDIA GPU on this machine" if setup.gpu is None else "there are no engines"
            yield Outcome(", ".join(ON_GPU), subject, SKIPPED, reason)
            continue
        for name, check in ON_GPU.items():
            yield run_check(name, subject, partial(check, setup, variant))
    yield run_check("benchmark", f"{bundle}, {library}", partial(speed.on_gpu, setup))
