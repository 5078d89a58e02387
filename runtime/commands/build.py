"""`fusionroute build`: TensorRT engines from a bundle's graphs, on this device."""

import time
from collections.abc import Callable
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.commands.options import BundleFolder, Debug, VerifyKey, names, one_of
from fusionroute.runtime.errors import InputError, UnavailableError
from fusionroute.runtime.integrity import checked
from fusionroute.runtime.manifest import Manifest
from fusionroute.runtime.tensorrt.engines import rebuild, target_for
from fusionroute.runtime.tensorrt.library import MODULES, NAMES, capabilities, device_sm, installed_flavour, load, parse_sms
from fusionroute.runtime.terminal import Terminal


def build(
    bundle: BundleFolder,
    precision: Annotated[str | None, typer.Option(help="Comma list; default: all that the bundle has for TensorRT.")] = None,
    flavour: Annotated[
        str | None, typer.Option(help="tensorrt or rtx; default: the one that is installed.", callback=one_of("flavour", MODULES))
    ] = None,
    sms: Annotated[str | None, typer.Option(help="GPUs to build for, such as sm86+sm89 (rtx only); default: this machine's.")] = None,
    workspace: Annotated[int | None, typer.Option(min=1, help="MiB of device memory for scratch space of the layers.")] = None,
    verify_key: VerifyKey = None,
    debug: Debug = False,
) -> None:
    """Build the TensorRT engines of a bundle from its graphs. Needs tensorrt or tensorrt-rtx, not torch.

    The manifest then names the engines, so the bundle loses its signature.
    """
    opened = Bundle.open(bundle, verify_key)
    if verify_key is not None:
        opened.verify()
    else:
        with checked(opened, False, None) as models_are_loaded:  # weights too, which the library reads by their path
            models_are_loaded()
    library = flavour or installed_flavour() or "tensorrt"
    target = target_for(opened.manifest, library, installed_version(library))
    available = [variant.precision for variant in opened.manifest.variants if variant.target == target]
    precisions = names(precision) if precision else tuple(available) or ("",)
    variants = [opened.variant(target, name) for name in precisions]
    gpus = gpus_to_build_for(library, sms)
    console = Terminal(stderr=True)
    start = time.perf_counter()
    with Progress(
        TextColumn("{task.description:<34}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), console=console
    ) as progress:

        def begin(engine: str) -> Callable[[float], None]:
            task = progress.add_task(f"building {engine}", total=1.0)
            return lambda share: progress.advance(task, share)

        manifest = rebuild(bundle, variants, opened.manifest, library, gpus, None if workspace is None else workspace << 20, begin)
    print_engines(manifest, target, precisions)
    console.print(f"{time.perf_counter() - start:.1f} seconds")


def print_engines(manifest: Manifest, target: str, precisions: tuple[str, ...]) -> None:
    """Print one line per precision: how many engines were built last, their size, library and GPUs."""
    for variant in manifest.variants:
        if variant.target == target and variant.precision in precisions:
            engines = variant.engines[-1]
            size = sum(manifest.files[path].bytes for path in engines.engines.values())
            gpus = ", ".join(f"sm{sm}" for sm in engines.sms)
            library = f"{NAMES[engines.flavour]} {engines.version}"
            print(f"{variant.precision}: {len(engines.engines)} engines, {size / 1e6:,.1f} MB, {library}, {gpus}")


def installed_version(flavour: str) -> str:
    """The library's version. Without the library one that is newer than all, so that its absence is reported when it is needed."""
    try:
        return str(load(flavour).__version__)
    except UnavailableError:
        return "99.0"


def gpus_to_build_for(flavour: str, sms: str | None) -> tuple[int, ...]:
    """Compute capabilities: those that --sms names, or this machine's. Raises InputError and UnavailableError."""
    if sms is not None and flavour == "tensorrt":
        raise InputError("TensorRT builds for the GPU it runs on: leave --sms out, or build with --flavour rtx.")
    if sms is not None:
        named = parse_sms(sms)
        capabilities(load(flavour), named)
        return named
    here = device_sm()
    if here is None:
        mend = "name GPUs with --sms, such as sm86+sm89+sm120" if flavour == "rtx" else "build on the device that will run the engines"
        raise UnavailableError(f"This machine has no NVIDIA GPU to build for: {mend}.")
    return (here,)
