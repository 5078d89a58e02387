"""Everything that only a machine with an NVIDIA GPU can tell, in one report. `make gpu-check` runs it.

python -m benchmarks.gpu_check [--bundle DIR …] [--out DIR] [--minutes 8]

First the device itself, then the runtime's code on its streams, events and graphs. Then both shipped systems, or the
bundles named: on ONNX Runtime's CUDA provider, and with each of TensorRT and TensorRT-RTX that is installed. Builds
engines for this GPU and adds them to the bundle. Compares the engines with the CPU backend, captured graphs with plain
runs, evicted experts with resident ones, and the speed of INT8 with that of half precision. Without a GPU it compares
the graphs on ONNX Runtime, builds TensorRT-RTX's engines for RTX GPUs, times the CPU, and says what it skipped.

The report is written anew after every check, so that a run that is ended leaves what it finished. With --minutes, what
does not fit is skipped. Exit status 1 where a check failed; a skipped check fails nothing.
"""

import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.gpu_check.budget import Budget
from benchmarks.gpu_check.checks import run_all
from benchmarks.gpu_check.outcome import FAILED, PASSED, SKIPPED, Outcome
from benchmarks.gpu_check.report import as_json, count_statuses, report
from fusionroute.runtime.bench.bench import PACKAGES
from fusionroute.runtime.errors import UnavailableError
from fusionroute.runtime.files import replacing
from fusionroute.runtime.machine import installed
from fusionroute.runtime.tensorrt.library import MODULES, NAMES, device_sm, load

COLOURS = {PASSED: "green", FAILED: "red", SKIPPED: "yellow"}
REPORT, FIGURES = "gpu-check.md", "gpu-check.json"


def main(
    bundle: Annotated[
        list[Path] | None, typer.Option(help="Bundle with graphs for TensorRT; repeat for several. Default: the shipped systems.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the report and the shipped systems' bundles.")] = Path("dist/gpu-check"),
    minutes: Annotated[float | None, typer.Option(help="Skip what does not fit in this time. Default: without end.")] = None,
) -> None:
    """Build, compare and time on this machine's GPU, and write one report."""
    console = Console(stderr=True, highlight=False)
    budget = Budget(minutes)
    out.mkdir(parents=True, exist_ok=True)
    gpu = device_sm()
    libraries = {flavour: str(load(flavour).__version__) for flavour in MODULES if loads(flavour)}
    machine = describe_machine(gpu, libraries)
    outcomes: list[Outcome] = []
    write(out, machine, outcomes)
    bundles = bundle or export_all_shipped(out, console)
    for outcome in run_all(bundles, list(libraries), gpu, budget, out):
        console.print(f"[{COLOURS[outcome.status]}]{outcome.status:<8}[/] {outcome.check}, {outcome.subject}: ", end="", soft_wrap=True)
        console.print(outcome.says, markup=False, soft_wrap=True)
        outcomes.append(outcome)
        write(out, machine, outcomes)
    print(f"{count_statuses(outcomes)}: {out / REPORT}")
    raise typer.Exit(int(any(outcome.status == FAILED for outcome in outcomes)))


def write(out: Path, machine: dict[str, Any], outcomes: list[Outcome]) -> None:
    """The report of what is finished, for people and for programs."""
    for name, text in ((REPORT, report(machine, outcomes)), (FIGURES, as_json(machine, outcomes))):
        with replacing(out / name) as partial:
            partial.write_text(text, encoding="utf-8")


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


def export_all_shipped(out: Path, console: Console) -> list[Path]:
    """The bundles of the shipped systems, exported at first use."""
    from benchmarks.gpu_check.shipped import export_shipped  # it needs the exporter's packages

    return export_shipped(out, console)


if __name__ == "__main__":
    typer.run(main)
