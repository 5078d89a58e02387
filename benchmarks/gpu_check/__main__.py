"""Everything that only a machine with an NVIDIA GPU can tell, in one report. `make gpu-check` runs it.

python -m benchmarks.gpu_check [--bundle DIR …] [--out DIR]

For both shipped systems, or for the bundles named, and for each of TensorRT and TensorRT-RTX that is installed: engines are built for this GPU,
held against the CPU backend, their captured graphs against plain runs, an eviction of experts against none, and INT8 is timed against half
precision. Without a GPU it says what it skipped, and still compares the graphs on ONNX Runtime, builds TensorRT-RTX's engines for RTX GPUs and
times the CPU. Engines are added to the bundles. Exit status 1 where a check that ran failed; what was skipped fails nothing.
"""

import json
import platform
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.gpu_checks import FAILED, PASSED, SKIPPED, Outcome, Place, checks, graphs, on_cpu, outcome
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.export import Request, export
from fusionroute.fr_export.families import FAMILIES, Family
from fusionroute.runtime.bench.bench import PACKAGES, installed
from fusionroute.runtime.errors import UnavailableError
from fusionroute.runtime.manifest import Manifest
from fusionroute.runtime.tensorrt.engines import TARGET
from fusionroute.runtime.tensorrt.library import MODULES, NAMES, device_sm, load

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
    libraries = {flavour: str(load(flavour).__version__) for flavour in MODULES if usable(flavour)}
    found = []
    for each in outcomes(bundle or [shipped(family, out, console) for family in FAMILIES.values()], list(libraries), gpu):
        console.print(f"[{COLOURS[each.status]}]{each.status:<8}[/] {each.check}, {each.subject}: ", end="", soft_wrap=True)
        console.print(each.says, markup=False, soft_wrap=True)
        found.append(each)
    about = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "gpu": None if gpu is None else f"sm{gpu}",
        "libraries": {NAMES[flavour]: version for flavour, version in libraries.items()},
        "packages": {name: version for name in (*PACKAGES, "cuda-bindings", "torch") if (version := installed(name))},
    }
    (out / REPORT).write_text(report(about, found), encoding="utf-8")
    print(f"{counted(found)}: {out / REPORT}")
    raise typer.Exit(int(any(each.status == FAILED for each in found)))


def usable(flavour: str) -> bool:
    """Whether a library is installed and loads."""
    try:
        load(flavour)
    except UnavailableError:
        return False
    return True


def outcomes(bundles: list[Path], flavours: list[str], gpu: int | None) -> Iterator[Outcome]:
    """All checks on all bundles, with every library."""
    for folder in bundles:
        for variant in Manifest.read(folder).variants:
            if variant.target == TARGET:
                yield outcome("graphs", f"{folder.name} {variant.precision}, ONNX Runtime", partial(graphs, folder, variant))
        yield outcome("benchmark", f"{folder.name}, CPU precisions", partial(on_cpu, folder))
        for flavour in flavours:
            yield from checks(Place(folder, flavour, gpu))
    for flavour in MODULES.keys() - set(flavours):
        mend = f"pip install 'fusionroute[{flavour}]'"
        yield Outcome("build", f"all, {NAMES[flavour]}", SKIPPED, f"{NAMES[flavour]} is not installed or does not load ({mend})")


def shipped(family: Family, out: Path, console: Console) -> Path:
    """The bundle of a family's shipped system, exported once."""
    folder, preset = out / family.name, family.preset("tiny")
    if not folder.exists():
        assert preset.router
        precisions = ("fp32", family.half, "int8")
        stages = Stages(console)
        with stages.progress:
            export(Request(family, preset.router, dict(preset.experts), precisions, ("ort:cpu", TARGET), folder), stages)
    return folder


def counted(found: list[Outcome]) -> str:
    """How many of each status."""
    return ", ".join(f"{sum(each.status == status for each in found)} {status}" for status in COLOURS)


def report(about: dict[str, Any], found: list[Outcome]) -> str:
    """The report: what was found, what was skipped and why, and all figures."""
    gpu = f"a GPU of compute capability {about['gpu']}" if about["gpu"] else "no NVIDIA GPU: nothing below ran on one"
    libraries = ", ".join(f"{name} {version}" for name, version in about["libraries"].items()) or "neither TensorRT nor TensorRT-RTX"
    lines = ["# GPU check", "", f"{about['time']}, {about['machine']}, with {gpu}; {libraries}. {counted(found)}.", ""]
    lines += ["| check | of | | |", "|---|---|---|---|"]
    lines += [f"| {each.check} | {each.subject} | {each.status} | {each.says.replace('|', '/')} |" for each in found]
    figures = json.dumps({**about, "outcomes": [asdict(each) for each in found]}, indent=1)
    return "\n".join([*lines, "", "<details><summary>All figures</summary>", "", "```json", figures, "```", "", "</details>", ""])


if __name__ == "__main__":
    typer.run(main)
