"""`python -m runtime bench`: how fast a bundle runs here, in which memory, and how near that is to what the machine can do."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from fusionroute.runtime.backends import KNOWN
from fusionroute.runtime.bench import bench as measuring
from fusionroute.runtime.bench.figure import library, plot
from fusionroute.runtime.bench.page import write_page
from fusionroute.runtime.bench.table import show
from fusionroute.runtime.errors import FusionError

WIDEST = 150  # columns that the table needs: a terminal wraps better than a table


def bench(
    bundle: Annotated[Path, typer.Argument(help="Folder that export.py wrote.")],
    precision: Annotated[str | None, typer.Option(help="Comma list, compared in turns; default: all in the bundle for the device.")] = None,
    device: Annotated[str, typer.Option(help=f"{', '.join(KNOWN)}.")] = "auto",
    prompt: Annotated[str | None, typer.Option(help="The prompt; default: a built-in text.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Repeat or cut the prompt to so many tokens.")] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate, whether or not the text ends before.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Texts measured of each row.")] = 5,
    rows: Annotated[
        str,
        typer.Option(
            help="Comma list: fused, fused:EXPERT (always that one), router or EXPERT (that model alone); +drafts behind one: with speculation."
        ),
    ] = "fused",
    sequential: Annotated[bool, typer.Option("--sequential", help="One precision at a time in memory, not in turns.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Write charts to this PNG file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page to this file.")] = None,
) -> None:
    """Measure a bundle: time to first token, tokens/s, memory, and the share of the memory bandwidth reached."""
    if device not in KNOWN:
        raise typer.BadParameter(f"unknown device '{device}'; expected {', '.join(KNOWN)}", param_hint="--device")
    for path in (plot_file, html):  # what is missing is found here, not after the measurement
        if path is not None:
            if not path.absolute().parent.is_dir():
                raise FusionError(f"{path} cannot be written, since {path.absolute().parent} is no folder: make it first.")
            library()
    names = tuple(name.strip() for name in precision.split(",")) if precision is not None else None
    request = measuring.BenchOptions(names, device, prompt, prompt_tokens, new_tokens, repeats, rows, sequential)
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description:<28}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("opening the bundle", total=1.0)
        result = measuring.bench(bundle, request, lambda what, share: progress.update(task, description=what, advance=share))
    if plot_file is not None:
        plot(result, plot_file)
    if html is not None:
        write_page(result, html)
    if as_json:
        print(json.dumps(result), flush=True)
    else:
        shown = Console(highlight=False)
        show(Console(highlight=False, width=max(shown.width, WIDEST)), result)
