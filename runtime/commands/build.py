"""`python -m runtime build`: TensorRT engines from a bundle's graphs, on this device."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.errors import InputError, UnavailableError
from fusionroute.runtime.tensorrt.engines import rebuild, target_for
from fusionroute.runtime.tensorrt.library import MODULES, NAMES, capabilities, device_sm, installed_flavour, load, parse_sms


def build(
    bundle: Annotated[Path, typer.Argument(help="Folder that export.py wrote, with graphs for TensorRT.")],
    precision: Annotated[str | None, typer.Option(help="Comma list; default: all that the bundle has for TensorRT.")] = None,
    flavour: Annotated[str | None, typer.Option(help="tensorrt or rtx; default: the one that is installed.")] = None,
    sms: Annotated[str | None, typer.Option(help="GPUs to build for, such as sm86+sm89 (rtx only); default: this machine's.")] = None,
    workspace: Annotated[int | None, typer.Option(min=1, help="MiB of device memory that layers may use beside their tensors.")] = None,
) -> None:
    """Build or rebuild the TensorRT engines of a bundle from its graphs: needs tensorrt or tensorrt-rtx, not torch."""
    opened = Bundle.open(bundle)
    chosen = flavour or installed_flavour() or "tensorrt"
    if chosen not in MODULES:
        raise InputError(f"Unknown flavour '{chosen}': use one of {', '.join(MODULES)}.")
    target = target_for(opened.manifest, chosen, installed_version(chosen))
    found = [variant for variant in opened.manifest.variants if variant.target == target]
    wanted = [name.strip() for name in precision.split(",")] if precision else [variant.precision for variant in found]
    variants = [opened.variant(target, name) for name in dict.fromkeys(wanted or [""])]
    gpus = machine(chosen, sms)
    console = Console(stderr=True, highlight=False)
    with Progress(TextColumn("{task.description:<34}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), console=console) as shown:

        def begin(name: str) -> Callable[[float], None]:
            task = shown.add_task(f"building {name}", total=1.0)
            return lambda share: shown.advance(task, share)

        start = time.perf_counter()
        limit = None if workspace is None else workspace << 20
        made = rebuild(bundle, variants, opened.manifest, chosen, gpus, limit, begin)
    names = {variant.precision for variant in variants}
    for variant in made.variants:
        if variant.target == target and variant.precision in names:
            engines = variant.engines[-1]
            size = sum(made.files[path].bytes for path in engines.engines.values())
            where = ", ".join(f"sm{sm}" for sm in engines.sms)
            print(f"{variant.precision}: {len(engines.engines)} engines, {size / 1e6:,.1f} MB, {NAMES[chosen]} {engines.version}, {where}")
    console.print(f"{time.perf_counter() - start:.1f} seconds")


def installed_version(flavour: str) -> str:
    """Of the library; where there is none, one as new as any, so that what is missing is said when it is needed."""
    try:
        return str(load(flavour).__version__)
    except UnavailableError:
        return "99.0"


def machine(flavour: str, sms: str | None) -> tuple[int, ...]:
    """The GPUs to build for: those that were named, or this machine's."""
    if sms is not None and flavour == "tensorrt":
        raise InputError("TensorRT builds for the GPU it runs on: leave --sms out, or build with --flavour rtx.")
    if sms is not None:
        found = parse_sms(sms)
        capabilities(load(flavour), found)
        return found
    here = device_sm()
    if here is None:
        mend = "name GPUs with --sms, such as sm86+sm89+sm120" if flavour == "rtx" else "build on the device that will run the engines"
        raise UnavailableError(f"This machine has no NVIDIA GPU to build for: {mend}.")
    return (here,)
