"""`fusionroute bench`: how fast a bundle runs here, in how much memory, and how near that is to what the machine can do."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from fusionroute.runtime.bench import bench as benchmark
from fusionroute.runtime.bench.figure import library, plot
from fusionroute.runtime.bench.page import write_bench_page
from fusionroute.runtime.bench.table import show
from fusionroute.runtime.commands.options import BundleFolder, Debug, Device, ExpertMemory, Json, Trust, VerifyKey, in_bytes, names
from fusionroute.runtime.html_page import check_folder
from fusionroute.runtime.terminal import Terminal


def bench(
    bundle: BundleFolder,
    precision: Annotated[str | None, typer.Option(help="Comma list, compared in turns; default: all in the bundle for the device.")] = None,
    device: Device = "auto",
    prompt: Annotated[str | None, typer.Option(help="The prompt; default: a built-in text.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Repeat or cut the prompt to this many tokens.")] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate, even where the text ends before.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="How often each row is measured.")] = 5,
    rows: Annotated[
        str,
        typer.Option(
            help="Comma list: fused, fused:EXPERT (always that one), router or EXPERT (that model alone); +drafts behind one: with speculation."
        ),
    ] = "fused",
    sequential: Annotated[bool, typer.Option("--sequential", help="One precision at a time in memory, not in turns.")] = False,
    expert_memory: ExpertMemory = None,
    as_json: Json = False,
    verify_key: VerifyKey = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Write charts to this PNG file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page to this file.")] = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Measure a bundle: time to first token, tokens/s, memory, and the share of the memory bandwidth reached."""
    for path in (plot_file, html):
        if path is not None:
            check_folder(path)
            library()  # says so before the measurement where charts cannot be drawn
    request = benchmark.BenchOptions(
        precisions=None if precision is None else names(precision),
        device=device,
        prompt=prompt,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        rows=rows,
        sequential=sequential,
        expert_memory=in_bytes(expert_memory),
        trusted=trust,
        verify_key=verify_key,
    )
    console = Terminal(stderr=True)
    columns = (TextColumn("{task.description:<28}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("opening the bundle", total=1.0)
        result = benchmark.bench(bundle, request, lambda what, share: progress.update(task, description=what, advance=share))
    if plot_file is not None:
        plot(result, plot_file)
    if html is not None:
        write_bench_page(result, html)
    if as_json:
        print(json.dumps(result))
    else:
        show(Terminal(), result)
