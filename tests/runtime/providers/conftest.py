"""Bundles for GPUs, and the GPU's backend opened on the CPU provider (which runs bf16 graphs as fp32 copies)."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
from rich.console import Console

from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.export import Request, export
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.verify.half_on_cpu import compute_half_on_cpu
from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.backend import Backend, BackendOptions
from fusionroute.runtime.backends import DEVICES
from fusionroute.runtime.backends.ort_gpu import OrtGpu
from fusionroute.runtime.backends.providers import PROVIDERS, no_options
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.manifest import Manifest, Variant
from tests.support.systems import SHIPPED, Shape, make_system

CPU = replace(PROVIDERS["ort-tensorrt"], name="CPUExecutionProvider", extra="cpu", options=no_options, memory="cpu", fallback=None)
CHUNK = 16  # so that prompts take several
Load = Callable[[Path, str, str], FusionRuntime]  # (bundle, target, precision)


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By family: `ort:cuda` in fp16 and bf16, `tensorrt` in fp16 and fp32; the bf16 graphs are copies in fp32 that
    round as bf16 does.
    """
    folders = {}
    for family in SHIPPED:
        folder = tmp_path_factory.mktemp(family)
        router, experts = make_system(folder, Shape(family, layers=2, experts=2))
        with patch("fusionroute.fr_export.export.measure", return_value=({}, "tests compare it")):
            for out, precisions, targets in (
                ("bundle", ("fp16", "fp32"), ("ort:cuda", "tensorrt")),
                ("emulated", ("bf16",), ("ort:cuda",)),
            ):
                request = Request(FAMILIES[family], router, experts, precisions, targets, folder / out, max_seq_len=320, calibration="none")
                export(request, Stages(Console(quiet=True)))
        compute_half_on_cpu(folder / "emulated")
        folders[family] = folder / "bundle"
    return folders


@contextmanager
def on_cpu(target: str) -> Iterator[None]:
    """device="bound": the GPU's backend on the CPU provider."""

    def opened(bundle: Bundle, variant: Variant, options: BackendOptions) -> Backend:
        return OrtGpu(bundle, variant, CPU, options.expert_memory)

    with (
        patch.dict(DEVICES, {"bound": ((target,), opened)}),
        patch("fusionroute.runtime.backends.KNOWN", (*DEVICES, "bound")),
        patch("fusionroute.runtime.limits.CHUNK", CHUNK),
    ):
        yield


def relabelled(bundle: Path, out: Path) -> Path:
    """A copy of an emulated bundle whose variants say that they are for CUDA."""
    shutil.copytree(bundle, out)
    manifest = Manifest.read(out)
    variants = [variant.model_copy(update={"target": "ort:cuda"}) for variant in manifest.variants]
    manifest.model_copy(update={"variants": variants}).write(out)
    return out
