"""What cannot run says so in one sentence, and no engine is deserialised that is not the one exported."""

import shutil
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from fusionroute.runtime import BundleError, FusionError, FusionRuntime, InputError, UnavailableError
from fusionroute.runtime.manifest import Manifest
from tests.support.simulated.bundles import described
from tests.support.simulated.cuda import Cuda
from tests.support.simulated.install import simulated
from tests.support.simulated.machine import Machine


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """A bundle to spoil."""
    return Path(shutil.copytree(folder, tmp_path / "bundle"))


def refused(folder: Path, machine: Machine, kind: type[FusionError], *words: str, device: str = "rtx") -> None:
    with simulated(machine), pytest.raises(kind) as caught:
        FusionRuntime.load(folder, device=device)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".")
    for word in words:
        assert word in sentence


def test_another_gpu_or_library_is_refused_by_name(folder: Path) -> None:
    refused(folder, Machine(sm=90), UnavailableError, "sm86, sm89", "sm90", f"fusionroute build {folder}")
    with patch("tests.support.simulated.tensorrt.TensorRt.__version__", "2.0.0"):
        refused(folder, Machine(), UnavailableError, "1.7.1.116", "2.0.0", "fusionroute build", device="tensorrt")


def test_a_changed_engine_is_never_deserialised(own: Path) -> None:
    """Also where it is changed after the bundle was opened, which checks hashes too."""
    engine = own / "engines/expert1.fp32.engine"
    engine.write_bytes(engine.read_bytes().replace(b"expert1", b"expert2"))
    refused(own, Machine(), BundleError, "expert1.fp32.engine was changed")
    with patch("fusionroute.runtime.bundle.Bundle.check"), patch("tests.support.simulated.tensorrt.Engine") as engine_class:
        refused(own, Machine(), BundleError, "expert1.fp32.engine was changed", "fusionroute build")
    assert not any("expert2" in str(call) or "expert1" in str(call) for call in engine_class.call_args_list)


def test_bytes_that_are_no_engine_are_named(own: Path) -> None:
    path = "engines/router.fp32.engine"
    (own / path).write_bytes(b"garbage")
    manifest = Manifest.read(own)
    manifest.model_copy(update={"files": manifest.files | {path: described(own, path)}}).write(own)
    refused(own, Machine(), BundleError, "cannot load", path, "magicTag", "fusionroute build")


def test_engines_of_another_shape_are_named(own: Path) -> None:
    manifest = Manifest.read(own)
    models = [manifest.models[0], *(model.model_copy(update={"kv_heads": 1}) for model in manifest.models[1:])]
    manifest.model_copy(update={"models": models}).write(own)
    refused(own, Machine(), BundleError, "expert0", "does not have the inputs and outputs")


@pytest.mark.parametrize("missing", ["cuda.bindings.runtime", "tensorrt_rtx"])
def test_missing_packages_are_named(folder: Path, missing: str) -> None:
    with simulated(Machine()), patch.dict(sys.modules, {missing: None}), pytest.raises(UnavailableError, match="install") as caught:
        FusionRuntime.load(folder, device="rtx")
    assert "\n" not in str(caught.value)


def test_no_device_is_said(folder: Path) -> None:
    with patch.object(Cuda, "cudaGetDeviceCount", lambda cuda: (100, None)):
        refused(
            folder, Machine(), UnavailableError,
            "No CUDA device answers here (", "simulated error 100",
            "): export the bundle for the CPU too (--target ort:cpu), or mend the driver.",
        )  # fmt: skip


def test_failures_of_cuda_name_the_call(folder: Path) -> None:
    with patch.object(Cuda, "cudaMalloc", lambda cuda, size: (2, 0)):
        refused(folder, Machine(), FusionError, "cudaMalloc", "simulated error 2")


def test_more_tokens_than_the_engines_read_are_refused(folder: Path) -> None:
    with simulated(Machine()), FusionRuntime.load(folder, device="rtx") as rt, pytest.raises(InputError, match="at most 4"):
        rt.score([3] * 8, chunk=8)


def test_weights_that_cannot_leave_are_said(folder: Path) -> None:
    with (
        simulated(Machine()),
        patch("tests.support.simulated.tensorrt.Engine.create_weights_manager", lambda engine: None),
        pytest.raises(UnavailableError, match="cannot evict the weights of expert0"),
    ):
        FusionRuntime.load(folder, device="rtx", expert_memory=10**6)
