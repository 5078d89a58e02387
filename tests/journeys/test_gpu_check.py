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

from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check import cpu_reference, cuda_tests, engines, facts, speed, texts
from benchmarks.gpu_check.outcome import Finding
from benchmarks.gpu_check.setup import Setup, same_variant
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
    """A finished run: exit status, report, and outcomes by check and by precision (or "CPU precisions", "all")."""

    status: int
    report: str
    outcomes: dict[tuple[str, str], list[dict[str, Any]]]

    def statuses(self, check: str, precision: str) -> set[str]:
        return {outcome["status"] for outcome in self.outcomes[check, precision]}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small system for CPU and TensorRT, where weight-only int8 replaces int8, which needs calibration."""
    folder = tmp_path_factory.mktemp("gpu")
    shape = Shape("gemma2", layers=1, experts=3, tokenizer=True, config={"tie_word_embeddings": False})
    router, experts = make_system(folder, shape, seed=2)
    out = folder / "bundle"
    targets, precisions = ("ort:cpu", "tensorrt"), ("fp32", "bf16", "int8", "int8-wo")
    request = Request(FAMILIES["gemma2"], router, experts, precisions, targets, out, max_seq_len=640, calibration="none")
    with patch("fusionroute.fr_export.export.measure", return_value=({}, "a test compares it")), patch.dict(SCHEMES["tensorrt"]):
        del SCHEMES["tensorrt"]["int8"]
        export(request, Stages(Console(quiet=True)))
    manifest = Manifest.read(out)
    renamed = [variant.model_copy(update={"precision": variant.precision.removesuffix("-wo")}) for variant in manifest.variants]
    manifest.model_copy(update={"variants": renamed}).write(out)
    return out


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


@pytest.fixture(autouse=True)
def short() -> Iterator[None]:
    """Few tokens, a fixed bandwidth, and bounds for random weights, which have many near ties."""
    with (
        patch.multiple(cpu_reference, TOKENS=64, NEW_TOKENS=10),
        patch.multiple(speed, NEW_TOKENS=8, REPEATS=2),
        patch.dict(PRECISIONS, {name: replace(PRECISIONS[name], bounds_on={"tensorrt": {"kl_mean": 0.05}}) for name in ("bf16", "int8")}),
        patch.object(bandwidth, "of_host", return_value=bandwidth.Bandwidth(1e10, 1)),
        # these run tests/cuda in a process of their own, and copy from memory that the simulated device does not know
        patch.object(cuda_tests, "run_tests", return_value=Finding(True, "not here", {})),
        patch.object(facts, "copies", return_value=Finding(True, "not here", {})),
    ):
        yield


def check(bundle: Path, out: Path, gpu: int | None) -> Checked:
    with patch.object(command, "device_sm", return_value=gpu), pytest.raises(typer.Exit) as end:
        command.main([bundle], out)
    report = (out / command.REPORT).read_text(encoding="utf-8")
    figures = json.loads(report[report.index("```json\n") + 8 : report.rindex("\n```")])
    outcomes: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for outcome in figures["outcomes"]:
        assert outcome["says"].replace("|", "/") in report
        precision = outcome["subject"].removeprefix(f"{bundle.name} ").removeprefix(f"{bundle.name}, ").partition(",")[0]
        outcomes.setdefault((outcome["check"], precision), []).append(outcome)
    return Checked(end.value.exit_code, report, outcomes)


def test_on_a_simulated_gpu(bundle: Path, tmp_path: Path) -> None:
    """Both libraries and all precisions, with the engines in the bundle, which are too small for a look at memory."""
    add_engines(bundle, chunk=512)
    with simulated(Machine(3, "random")):
        checked = check(bundle, tmp_path / "out", 89)
    assert checked.status == 0, checked.report
    assert checked.statuses("device", "the GPU") == {"passed"} and "compute capability 8.9" in checked.report
    assert checked.statuses("parity, speed", "ONNX Runtime on CUDA") == {"skipped"}, "the bundle has nothing for it"
    assert json.loads((tmp_path / "out" / command.FIGURES).read_text())["outcomes"]
    for precision in ("fp32", "bf16", "int8"):
        for name in ("graphs", "build", "parity", "graph replay", "eviction"):
            assert checked.statuses(name, precision) == {"passed"}, (name, precision)
            assert len(checked.outcomes[name, precision]) == (1 if name == "graphs" else 2)
        assert "too small to tell" in checked.outcomes["weights once", precision][0]["says"]
        assert all(outcome["figures"]["launches"] > 0 for outcome in checked.outcomes["graph replay", precision])
        for figures in (outcome["figures"] for outcome in checked.outcomes["eviction", precision]):
            assert figures["experts_used"] > 1 and figures["device_memory"] < figures["device_memory_without"]
    assert checked.statuses("same tokens", "fp32") == {"passed"} and checked.statuses("same tokens", "int8") == {"skipped"}
    [on_cpu] = [outcome for outcome in checked.outcomes["benchmark", "CPU precisions"] if outcome["figures"]["device"] == "cpu"]
    assert any("not engines on a GPU" in note for note in on_cpu["figures"]["notes"])
    benchmarks = [outcome for (name, _), outcomes in checked.outcomes.items() if name == "benchmark" for outcome in outcomes]
    on_gpu = [outcome["figures"] for outcome in benchmarks if outcome is not on_cpu]
    assert {figures["device"] for figures in on_gpu} == {"tensorrt", "rtx"}
    assert all([row["precision"] for row in figures["rows"]] == ["int8", "int8", "bf16", "bf16"] for figures in on_gpu)
    assert "sm89" in checked.report and "no NVIDIA GPU" not in checked.report


def test_wrong_engines_fail(bundle: Path, tmp_path: Path) -> None:
    """The experts' engines are swapped: the tokens change, though the graphs are right."""
    add_engines(bundle, chunk=512)
    manifest = Manifest.read(bundle)

    def swapped(built: Engines) -> Engines:
        engines = built.engines | {f"expert{n}": built.engines[f"expert{(n + 1) % 3}"] for n in range(3)}
        return built.model_copy(update={"engines": engines})

    fp32 = [variant for variant in manifest.variants if variant.precision == "fp32"]
    variants = [variant.model_copy(update={"engines": [*map(swapped, variant.engines)]}) for variant in fp32]
    manifest.model_copy(update={"variants": variants}).write(bundle)
    with simulated(Machine()), patch.object(Residency, "bring", side_effect=RuntimeError("two\nlines")):
        checked = check(bundle, tmp_path / "out", 89)
    assert checked.status == 1
    assert checked.statuses("parity", "fp32") == checked.statuses("same tokens", "fp32") == {"failed"}
    assert checked.statuses("graphs", "fp32") == checked.statuses("graph replay", "fp32") == {"passed"}
    assert "misses its bound" in checked.outcomes["parity", "fp32"][0]["says"]
    assert checked.outcomes["eviction", "fp32"][0]["says"] == "RuntimeError: two lines"
    assert "only fp32" in checked.outcomes["benchmark", "CPU precisions"][0]["says"]


def test_captures_that_go_wrong_are_seen(bundle: Path, tmp_path: Path) -> None:
    """The check fails if launches do nothing (buffers then hold the previous step) or if nothing is captured."""
    add_engines(bundle, chunk=512)
    [fp32] = [variant for variant in Manifest.read(bundle).variants if (variant.target, variant.precision) == ("tensorrt", "fp32")]
    setup = Setup(bundle, "rtx", 89)
    with simulated(Machine()):
        with patch("tests.support.simulated.cuda.Cuda.cudaGraphLaunch", lambda *_: (0,)):
            assert texts.graph_replay(setup, fp32).passed is False
        with patch("tests.support.simulated.tensorrt.Context.is_stream_capturable", lambda *_: False):
            assert texts.graph_replay(setup, fp32).passed is False


@pytest.mark.parametrize(("one_copy", "good"), [(2.0, False), (1e6, True)])
def test_memory_is_held_against_the_engines(bundle: Path, one_copy: float, good: bool) -> None:
    """Engines on the simulated device are far larger than their files."""
    add_engines(bundle, chunk=512)
    variant = next(variant for variant in Manifest.read(bundle).variants if variant.target == "tensorrt")
    with simulated(Machine()), patch.multiple(engines, SMALLEST=0, ONE_COPY=one_copy):
        passed, says, figures = engines.weights_once(Setup(bundle, "rtx", 89), variant)
    assert passed is good and f"{figures['device_memory'] / figures['engines']:.2f} times" in says
    assert figures["engines"] == sum(path.stat().st_size for path in (bundle / "engines").glob("*.fp32.engine"))
    assert figures["device_memory"] > 5 * WEIGHTS


def test_without_a_gpu(bundle: Path, tmp_path: Path) -> None:
    """TensorRT-RTX's engines are built if it is installed; whatever needs a GPU is skipped, and nothing fails."""
    manifest = Manifest.read(bundle)
    variants = [variant for variant in manifest.variants if variant.precision != "fp32" or variant.target == "ort:cpu"]
    manifest.model_copy(update={"variants": variants}).write(bundle)
    checked = check(bundle, tmp_path / "out", None)
    assert checked.status == 0, checked.report
    assert "nothing below ran on one" in checked.report
    built = Manifest.read(bundle)
    for precision in ("bf16", "int8"):
        assert checked.statuses("graphs", precision) == {"passed"}
        if command.loads("rtx"):
            assert checked.statuses("build", precision) == {"passed"}
            assert checked.statuses(", ".join(ON_GPU), precision) == {"skipped"}
            variant = next(v for v in variants if (v.target, v.precision) == ("tensorrt", precision))
            assert [engine.sms for engine in same_variant(built, variant).engines] == [[86, 89, 120]]
    missing = [outcome["says"] for outcome in checked.outcomes["build", "all"]]
    assert any("TensorRT is not installed or does not load" in says for says in missing) or command.loads("tensorrt")


def test_without_libraries_or_a_cpu_to_hold_against(bundle: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(bundle)
    variants = [variant for variant in manifest.variants if variant.target == "tensorrt"]
    manifest.model_copy(update={"variants": variants}).write(bundle)
    with patch.object(command, "loads", return_value=False):
        checked = check(bundle, tmp_path / "out", None)
    assert checked.status == 0
    assert {outcome["status"] for outcomes in checked.outcomes.values() for outcome in outcomes} == {"skipped"}
    assert "no fp32 for the CPU" in checked.report and "neither TensorRT nor TensorRT-RTX" in checked.report
