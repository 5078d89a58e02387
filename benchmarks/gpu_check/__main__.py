"""Everything that only a machine with an NVIDIA GPU can tell, in one report. `make gpu-check` runs it.

python -m benchmarks.gpu_check [--bundle DIR …] [--out DIR]

Checks both shipped systems, or the bundles named, with each of TensorRT and TensorRT-RTX that is installed. Builds
engines for this GPU and adds them to the bundle. Compares the engines with the CPU backend, captured graphs with plain
runs, evicted experts with resident ones, and the speed of INT8 with that of half precision. Without a GPU it compares
the graphs on ONNX Runtime, builds TensorRT-RTX's engines for RTX GPUs, times the CPU, and says what it skipped. Exit
status 1 where a check failed; a skipped check fails nothing.
"""

import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.gpu_check.checks import run_all
from benchmarks.gpu_check.outcome import FAILED, PASSED, SKIPPED
from benchmarks.gpu_check.report import count_statuses, report
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.export import Request, export
from fusionroute.fr_export.families import FAMILIES, Family
from fusionroute.runtime.bench.bench import PACKAGES
from fusionroute.runtime.errors import UnavailableError
from fusionroute.runtime.machine import installed
from fusionroute.runtime.tensorrt.library import MODULES, NAMES, TARGET, device_sm, load

COLOURS = {PASSED: "green", FAILED: "red", SKIPPED: "yellow"}
REPORT = "gpu-check.md"


def main(
    bundle: Annotated[
        list[Path] | None, typer.Option(help="Bundle with graphs for TensorRT; repeat for several. Default: the shipped systems.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the report and the shipped systems' bundles.")] = Path("dist/gpu-check"),
) -> None:
    """Build, compare and time on this machine's GPU, and write one report."""
    console = Console(stderr=True, highlight=False)
    out.mkdir(parents=True, exist_ok=True)
    gpu = device_sm()
    libraries = {flavour: str(load(flavour).__version__) for flavour in MODULES if loads(flavour)}
    bundles = bundle or [export_shipped(family, out, console) for family in FAMILIES.values() if family.ships_tiny]
    outcomes = []
    for outcome in run_all(bundles, list(libraries), gpu):
        console.print(f"[{COLOURS[outcome.status]}]{outcome.status:<8}[/] {outcome.check}, {outcome.subject}: ", end="", soft_wrap=True)
        console.print(outcome.says, markup=False, soft_wrap=True)
        outcomes.append(outcome)
    (out / REPORT).write_text(report(describe_machine(gpu, libraries), outcomes), encoding="utf-8")
    print(f"{count_statuses(outcomes)}: {out / REPORT}")
    raise typer.Exit(int(any(outcome.status == FAILED for outcome in outcomes)))


def loads(flavour: str) -> bool:
    """Whether a library is installed and loads."""
    try:
        load(flavour)
    except UnavailableError:
        return False
    return True


def describe_machine(gpu: int | None, libraries: dict[str, str]) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "gpu": None if gpu is None else f"sm{gpu}",
        "libraries": {NAMES[flavour]: version for flavour, version in libraries.items()},
        "packages": {name: version for name in (*PACKAGES, "cuda-bindings", "torch") if (version := installed(name))},
    }


def export_shipped(family: Family, out: Path, console: Console) -> Path:
    """The bundle of a family's shipped system, exported at first use."""
    folder, preset = out / family.name, family.preset("tiny")
    if not folder.exists():
        assert preset.router
        precisions = ("fp32", family.half, "int8")
        stages = Stages(console)
        with stages.progress:
            export(Request(family, preset.router, dict(preset.experts), precisions, ("ort:cpu", TARGET), folder), stages)
    return folder


if __name__ == "__main__":
    typer.run(main)
