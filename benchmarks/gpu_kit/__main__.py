"""A kit of the GPU check for a machine without network. `make gpu-kit OUT=…` makes it.

python -m benchmarks.gpu_kit OUT [--part 60] [--python 3.12] [--machine x86_64] [--bundle DIR …] [--onnxruntime SPEC]

On that machine: `bash run.sh --minutes 8`. It joins the parts, makes a virtual environment that sees the machine's own
packages (torch, cuda-bindings, NVIDIA's libraries), installs the wheels there and runs `benchmarks.gpu_check`, whose
report is in `report/` from the first check on.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.gpu_kit.kit import close, lay_out
from benchmarks.gpu_kit.wheels import MACHINES, fetch
from fusionroute.runtime.errors import FusionError


def main(
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    part: Annotated[int | None, typer.Option(help="Cut into parts of at most this many MB. Default: folders as they are.")] = None,
    python: Annotated[str, typer.Option(help="The machine's Python.")] = "3.12",
    machine: Annotated[str, typer.Option(help="The machine's processor: x86_64 or aarch64.")] = "x86_64",
    bundle: Annotated[list[Path] | None, typer.Option(help="Bundle to check; repeat for several. Default: the shipped systems.")] = None,
    onnxruntime: Annotated[str | None, typer.Option(help="The requirement that installs ONNX Runtime there.")] = None,
) -> None:
    """Make a kit."""
    console = Console(stderr=True, highlight=False)
    if machine not in MACHINES:
        raise typer.BadParameter(f"expected {' or '.join(MACHINES)}", param_hint="--machine")
    try:
        if bundle is None:
            from benchmarks.gpu_check.shipped import export_shipped  # it needs the exporter's packages

            bundle = export_shipped(Path("dist/gpu-check"), console)
        wheels = lay_out(out, bundle)
        console.print("fetching wheels")
        close(out, fetch(wheels, python, machine, onnxruntime), part)
    except FusionError as error:
        console.print(f"error: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {size / 1e6:.0f} MB; there: bash run.sh --minutes 8")


if __name__ == "__main__":
    typer.run(main)
