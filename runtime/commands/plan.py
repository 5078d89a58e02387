"""`fusionroute plan`: whether a system fits a device, how fast it would be, and what to export."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fusionroute.runtime.bench.figure import library
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.commands.options import Debug, Json, names
from fusionroute.runtime.errors import InputError
from fusionroute.runtime.html_page import check_folder
from fusionroute.runtime.plan.check import check
from fusionroute.runtime.plan.devices import THIS, Device, described, device_named, devices
from fusionroute.runtime.plan.machine import this_machine
from fusionroute.runtime.plan.picture import draw
from fusionroute.runtime.plan.plan import make_plan
from fusionroute.runtime.plan.shapes import shape_of, shapes
from fusionroute.runtime.plan.speed import Text
from fusionroute.runtime.plan.systems import Request, of_bundle, of_shape
from fusionroute.runtime.plan.table import show, show_checks
from fusionroute.runtime.terminal import Terminal, print_json

FAMILIES = ", ".join(dict.fromkeys(shape.family for shape in shapes()))
CONTEXT = 4096  # as `export` takes where nothing is said


def plan(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="[BUNDLE]", help="Folder of an exported bundle; or name --family and --size.")
    ] = None,
    family: Annotated[str | None, typer.Option(help=f"{FAMILIES}.")] = None,
    size: Annotated[str | None, typer.Option(help="Such as 8B.")] = None,
    experts: Annotated[
        int | None, typer.Option(help="How many; 0: one model alone, which is what published figures are about. [default: 3]")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of the longest text. [default: 4096, or the bundle's]")] = None,
    shared_base: Annotated[bool, typer.Option("--shared-base", help="Experts are factors on the router's weights.")] = False,
    rank: Annotated[int, typer.Option(help="Of these factors.")] = 32,
    target: Annotated[str | None, typer.Option(help=f"{', '.join(devices())}, or {THIS}, which is measured.")] = None,
    device_memory: Annotated[str | None, typer.Option(help="Of a GPU that is not in the list, such as 8GiB.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="Of its memory, in GB/s, such as 68.")] = None,
    precision: Annotated[str | None, typer.Option(help="Comma list; default: all that the target has.")] = None,
    switch_rate: Annotated[float, typer.Option(help="Share of the tokens that come from another expert than the one before.")] = 0.1,
    acceptance: Annotated[float | None, typer.Option(help="With speculation: share of the drafted tokens that are right.")] = None,
    picture: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw memory and speed into this PNG file.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say before an export what fits a device, how fast it would be, and which precision to take. It is an estimate.

    With --target this, a BUNDLE for this machine is also run, and the estimate is held against that.
    """
    if picture is not None:
        check_folder(picture)
        library()  # says so first where pictures cannot be drawn
    opened = None if bundle is None else Bundle.open(bundle)
    request = requested(opened, family, size, experts, context, shared_base, rank)
    device = chosen(target, device_memory, bandwidth)
    planned = make_plan(request, device, Text(switch_rate, acceptance), None if precision is None else names(precision))
    checks = check(opened, planned) if opened is not None and device.name == THIS else []
    if picture is not None:
        draw(planned, picture)
    if as_json:
        result: dict[str, Any] = planned.as_json()
        print_json(result | ({"checks": [each.as_json() for each in checks]} if checks else {}))
    else:
        show(console := Terminal(), planned)
        show_checks(console, checks)


def requested(
    bundle: Bundle | None, family: str | None, size: str | None, experts: int | None, context: int | None, shared_base: bool, rank: int
) -> Request:
    """The system that the options name. Raises InputError where they name none, or two."""
    if bundle is not None:
        if family or size or experts is not None or shared_base:
            raise InputError("A bundle says what it holds: leave --family, --size, --experts and --shared-base out, or the bundle.")
        return of_bundle(bundle, context)
    if family is None or size is None:
        raise InputError("Name what to plan: the folder of a bundle, or --family and --size, such as --family llama3 --size 8B.")
    shape = shape_of(family, size)
    return of_shape(shape, 3 if experts is None else experts, context or min(CONTEXT, shape.context), shared_base, rank)


def chosen(target: str | None, device_memory: str | None, bandwidth: float | None) -> Device:
    """The device that the options name. Raises InputError where they name none, or two."""
    if target is None and device_memory is not None and bandwidth is not None:
        return described(device_memory, bandwidth)
    if target is None or device_memory is not None or bandwidth is not None:
        raise InputError(f"Name one device: --target ({', '.join(devices())}, {THIS}), or --device-memory 8GiB with --bandwidth 68.")
    return this_machine() if target == THIS else device_named(target)
