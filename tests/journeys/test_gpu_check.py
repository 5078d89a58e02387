"""`make gpu-check`: on a simulated GPU, whose engines may be wrong ones, and on this machine without one."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import typer
from rich.console import Console

from benchmarks import gpu_check, gpu_checks
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.export import Request, export
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.precision import SCHEMES
from fusionroute.runtime.bench import bandwidth
from fusionroute.runtime.manifest import Engines, Manifest
from fusionroute.runtime.precisions import PRECISIONS
from fusionroute.runtime.tensorrt.residency import Residency
from tests.support.simulated.bundles import add_engines
from tests.support.simulated.install import simulated
from tests.support.simulated.machine import Machine
from tests.support.simulated.tensorrt import WEIGHTS
from tests.support.systems import Shape, make_system

ON_GPU = ("parity", "same tokens", "graph replay", "eviction", "weights once")


class Checked(NamedTuple):
    """A finished check: exit status, the report, and (check, precision or what else it is of) → outcomes."""

    status: int
    report: str
    found: dict[tuple[str, str], list[dict[str, Any]]]

    def statuses(self, check: str, precision: str) -> set[str]:
        return {each["status"] for each in self.found[check, precision]}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small system for the CPU and for TensorRT, where weight-only int8 stands for int8, which would need calibration."""
    folder = tmp_path_factory.mktemp("gpu")
    out, (router, experts) = (
        folder / "bundle",
        make_system(folder, Shape("gemma2", layers=1, experts=3, tokenizer=True, config={"tie_word_embeddings": False}), seed=2),
    )
    targets, precisions = ("ort:cpu", "tensorrt"), ("fp32", "bf16", "int8", "int8-wo")
    wanted = Request(FAMILIES["gemma2"], router, experts, precisions, targets, out, max_seq_len=640, calibration="none")
    with patch("fusionroute.fr_export.export.measure", return_value=({}, "a test compares it")), patch.dict(SCHEMES["tensorrt"]):
        del SCHEMES["tensorrt"]["int8"]
        export(wanted, Stages(Console(quiet=True)))
    made = Manifest.read(out)
    named = [each.model_copy(update={"precision": each.precision.removesuffix("-wo")}) for each in made.variants]
    made.model_copy(update={"variants": named}).write(out)
    return out


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


@pytest.fixture(autouse=True)
def short() -> Iterator[None]:
    """Few tokens, a bandwidth that need not be measured, and bounds for random weights, many of whose choices are near ties."""
    with (
        patch.multiple(gpu_checks, TOKENS=64, NEW_TOKENS=10, BENCHED=8, REPEATS=2),
        patch.dict(PRECISIONS, {name: replace(PRECISIONS[name], bounds_on={"tensorrt": {"kl_mean": 0.05}}) for name in ("bf16", "int8")}),
        patch.object(bandwidth, "of_host", return_value=bandwidth.Bandwidth(1e10, 1)),
    ):
        yield


def check(bundle: Path, out: Path, gpu: int | None) -> Checked:
    with patch.object(gpu_check, "device_sm", return_value=gpu), pytest.raises(typer.Exit) as end:
        gpu_check.main([bundle], out)
    report = (out / gpu_check.REPORT).read_text(encoding="utf-8")
    figures = json.loads(report[report.index("```json\n") + 8 : report.rindex("\n```")])
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for each in figures["outcomes"]:
        assert each["says"].replace("|", "/") in report
        found.setdefault(
            (each["check"], each["subject"].removeprefix(f"{bundle.name} ").removeprefix(f"{bundle.name}, ").partition(",")[0]), []
        ).append(each)
    return Checked(end.value.exit_code, report, found)


def test_on_a_simulated_gpu(bundle: Path, tmp_path: Path) -> None:
    """Both libraries, all precisions; the engines are those in the bundle, and of their memory it says that it is too small to tell."""
    add_engines(bundle, chunk=512)
    with simulated(Machine(3, "random")):
        checked = check(bundle, tmp_path / "out", 89)
    assert checked.status == 0, checked.report
    for precision in ("fp32", "bf16", "int8"):
        for name in ("graphs", "build", "parity", "graph replay", "eviction"):
            assert checked.statuses(name, precision) == {"passed"}, (name, precision)
            assert len(checked.found[name, precision]) == (1 if name == "graphs" else 2)
        assert "too small to tell" in checked.found["weights once", precision][0]["says"]
        assert all(each["figures"]["launches"] > 0 for each in checked.found["graph replay", precision])
        for each in checked.found["eviction", precision]:
            assert each["figures"]["experts_used"] > 1 and each["figures"]["device_memory"] < each["figures"]["device_memory_without"]
    assert checked.statuses("same tokens", "fp32") == {"passed"} and checked.statuses("same tokens", "int8") == {"skipped"}
    [on_cpu] = [each for each in checked.found["benchmark", "CPU precisions"] if each["figures"]["device"] == "cpu"]
    assert any("not engines on a GPU" in note for note in on_cpu["figures"]["notes"])
    on_gpu = [each for found in checked.found.values() for each in found if each["check"] == "benchmark" and each is not on_cpu]
    assert {each["figures"]["device"] for each in on_gpu} == {"tensorrt", "rtx"}
    assert all([row["precision"] for row in each["figures"]["rows"]] == ["int8", "int8", "bf16", "bf16"] for each in on_gpu)
    assert "sm89" in checked.report and "no NVIDIA GPU" not in checked.report


def test_wrong_engines_fail(bundle: Path, tmp_path: Path) -> None:
    """The experts' engines change places: the tokens are others, and the graphs are not at fault."""
    add_engines(bundle, chunk=512)
    manifest = Manifest.read(bundle)

    def swapped(built: Engines) -> Engines:
        engines = built.engines | {f"expert{n}": built.engines[f"expert{(n + 1) % 3}"] for n in range(3)}
        return built.model_copy(update={"engines": engines})

    variants = [
        each.model_copy(update={"engines": [*map(swapped, each.engines)]}) for each in manifest.variants if each.precision == "fp32"
    ]
    manifest.model_copy(update={"variants": variants}).write(bundle)
    with simulated(Machine()), patch.object(Residency, "bring", side_effect=RuntimeError("two\nlines")):
        checked = check(bundle, tmp_path / "out", 89)
    assert checked.status == 1
    assert checked.statuses("parity", "fp32") == checked.statuses("same tokens", "fp32") == {"failed"}
    assert checked.statuses("graphs", "fp32") == checked.statuses("graph replay", "fp32") == {"passed"}
    assert "misses its bound" in checked.found["parity", "fp32"][0]["says"]
    assert checked.found["eviction", "fp32"][0]["says"] == "RuntimeError: two lines"
    assert "only fp32" in checked.found["benchmark", "CPU precisions"][0]["says"]


def test_captures_that_go_wrong_are_seen(bundle: Path, tmp_path: Path) -> None:
    """A launch that does nothing leaves the step before in the buffers; where nothing is captured, the check has nothing to say for it."""
    add_engines(bundle, chunk=512)
    [variant] = [each for each in Manifest.read(bundle).variants if (each.target, each.precision) == ("tensorrt", "fp32")]
    place = gpu_checks.Place(bundle, "rtx", 89)
    with simulated(Machine()):
        with patch("tests.support.simulated.cuda.Cuda.cudaGraphLaunch", lambda *_: (0,)):
            assert gpu_checks.replay(place, variant)[0] is False
        with patch("tests.support.simulated.tensorrt.Context.is_stream_capturable", lambda *_: False):
            assert gpu_checks.replay(place, variant)[0] is False


@pytest.mark.parametrize(("once", "good"), [(2.0, False), (1e6, True)])
def test_memory_is_held_against_the_engines(bundle: Path, once: float, good: bool) -> None:
    """Engines on the simulated device are far larger than their files."""
    add_engines(bundle, chunk=512)
    variant = next(each for each in Manifest.read(bundle).variants if each.target == "tensorrt")
    with simulated(Machine()), patch.multiple(gpu_checks, TELLING=0, ONCE=once):
        found, says, figures = gpu_checks.memory(gpu_checks.Place(bundle, "rtx", 89), variant)
    assert found is good and f"{figures['device_memory'] / figures['engines']:.2f} times" in says
    assert figures["engines"] == sum(path.stat().st_size for path in (bundle / "engines").glob("*.fp32.engine"))
    assert figures["device_memory"] > 5 * WEIGHTS


def test_without_a_gpu(bundle: Path, tmp_path: Path) -> None:
    """TensorRT-RTX's engines are built where it is installed; all that needs a GPU is skipped and said so, and nothing fails."""
    keep = [each for each in Manifest.read(bundle).variants if each.precision != "fp32" or each.target == "ort:cpu"]
    Manifest.read(bundle).model_copy(update={"variants": keep}).write(bundle)
    checked = check(bundle, tmp_path / "out", None)
    assert checked.status == 0, checked.report
    assert "nothing below ran on one" in checked.report
    built = Manifest.read(bundle)
    for precision in ("bf16", "int8"):
        assert checked.statuses("graphs", precision) == {"passed"}
        if gpu_check.usable("rtx"):
            assert checked.statuses("build", precision) == {"passed"}
            assert checked.statuses(", ".join(ON_GPU), precision) == {"skipped"}
            [engines] = gpu_checks.named(built, next(v for v in keep if (v.target, v.precision) == ("tensorrt", precision))).engines
            assert engines.sms == [86, 89, 120]
    missing = [each["says"] for each in checked.found["build", "all"]]
    assert any("TensorRT is not installed or does not load" in says for says in missing) or gpu_check.usable("tensorrt")


def test_without_libraries_or_a_cpu_to_hold_against(bundle: Path, tmp_path: Path) -> None:
    only = [each for each in Manifest.read(bundle).variants if each.target == "tensorrt"]
    Manifest.read(bundle).model_copy(update={"variants": only}).write(bundle)
    with patch.object(gpu_check, "usable", return_value=False):
        checked = check(bundle, tmp_path / "out", None)
    assert checked.status == 0
    assert {each["status"] for found in checked.found.values() for each in found} == {"skipped"}
    assert "no fp32 for the CPU" in checked.report and "neither TensorRT nor TensorRT-RTX" in checked.report
