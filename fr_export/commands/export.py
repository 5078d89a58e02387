"""`python export.py`, `fusionroute export`: the flags of the exporter, read straight into a `Request`."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from fusionroute.fr_export.commands.options import BaseOption, ExpertOptions, FamilyOption, parse_experts
from fusionroute.fr_export.families import Family
from fusionroute.runtime.command_errors import fail, one_sentence
from fusionroute.runtime.commands.options import Debug, Json, names
from fusionroute.runtime.errors import FusionError, InputError
from fusionroute.runtime.manifest import Fusion
from fusionroute.runtime.precisions import RECORDS
from fusionroute.runtime.tensorrt.library import parse_sms

# as the command line spells them → what they are for
TARGET_HELP = {
    "ort": "ONNX Runtime on CPU",
    "ort:cuda": "ONNX Runtime on GPUs",
    "portable": "Optimum",
    "tensorrt": "graphs for TensorRT",
    "tensorrt:10.3": "graphs for JetPack 6",
    "rtx[:sm86+sm89+sm120]": "graphs and TensorRT-RTX engines",
}
ALIASES = {"ort": "ort:cpu", "rtx": "tensorrt"}
SMS = (86, 89, 120)  # what engines are built for where no GPUs are named: GeForce RTX 30, 40 and 50
MISSING = "The exporter needs the package '{}': install the extra 'export' (pip install 'fusionroute[export,cpu]')."


def parse_lambda(value: float | None) -> float | None:
    """λ, which the flag's own range has checked but for NaN."""
    if value is not None and not 0 <= value <= 1:
        raise typer.BadParameter(f"{value} is not in the range 0<=x<=1.", param_hint="--lambda")
    return value


def parse_targets(text: str) -> tuple[str, ...]:
    """Comma list of targets, without repetitions. `ort` means `ort:cpu`, and `rtx` the graphs of `tensorrt`."""
    from fusionroute.fr_export.precision import SCHEMES

    targets = tuple(dict.fromkeys(ALIASES.get(without_gpus(name), name) for name in names(text)))
    for target in targets:
        if target not in SCHEMES:
            known = ", ".join(dict.fromkeys((*TARGET_HELP, *SCHEMES)))
            raise typer.BadParameter(f"unknown target '{target}'; this version exports {known}", param_hint="--target")
    return targets


def without_gpus(name: str) -> str:
    """A target without the GPUs behind `rtx:`."""
    return "rtx" if name.startswith("rtx:") else name


def parse_gpus(text: str) -> tuple[int, ...]:
    """The compute capabilities in `rtx:sm86+sm89` among the targets: `SMS` for a plain `rtx`, none without it."""
    sms: list[int] = []
    for name in names(text):
        if without_gpus(name) == "rtx":
            _, colon, gpus = name.partition(":")
            try:
                sms += parse_sms(gpus) if colon else SMS
            except InputError as error:
                raise typer.BadParameter(str(error).rstrip("."), param_hint="--target") from error
    return tuple(dict.fromkeys(sms))


def parse_precisions(text: str | None, targets: tuple[str, ...], family: Family) -> tuple[str, ...]:
    """Comma list of precisions, or the family's defaults. Each is exported for every target that has it."""
    from fusionroute.fr_export.precision import SCHEMES

    if text is None:
        defaults = ((target, name) for target in targets for name in family.precisions.get(target, family.precisions["other"]))
        return tuple(dict.fromkeys(name for target, name in defaults if name in SCHEMES[target]))
    precisions = names(text)
    known = dict.fromkeys(precision for target in targets for precision in SCHEMES[target])
    for precision in precisions:
        if precision not in known:
            raise typer.BadParameter(
                f"unknown precision '{precision}' for {' and '.join(targets)}; expected {', '.join(known)}", param_hint="--precision"
            )
    for target in targets:
        if not set(precisions) & SCHEMES[target].keys():
            raise typer.BadParameter(
                f"{target} has no precision {' or '.join(precisions)}; name one of {', '.join(SCHEMES[target])} too, or leave the target out",
                param_hint="--precision",
            )
    return precisions


def find_checkpoints(family: Family, preset: str | None, router: str | None, experts: dict[str, str]) -> tuple[str, dict[str, str]]:
    """The sources of the router and of the experts: those that are named, the rest from the preset."""
    if preset is None and (router is None) != (not experts):
        raise typer.BadParameter("--router and --expert go together, unless --preset names the rest", param_hint="--router / --expert")
    defaults = family.preset(preset or "tiny") if preset or router is None else None
    router = router or (defaults.router if defaults else None)
    if router is None:
        raise FusionError(f"No router is published for the preset '{preset}' of {family.name}: train one and name it with --router.")
    return router, experts or dict(defaults.experts if defaults else {})


def main(
    family: FamilyOption,
    preset: Annotated[
        Literal["tiny", "paper"] | None,
        typer.Option(help="Named checkpoints: tiny (ships with the package; the default) or paper (hub ids)."),
    ] = None,
    router: Annotated[str | None, typer.Option(help="Router checkpoint: a folder or hub id, with a routing head.")] = None,
    expert: ExpertOptions = None,
    base: BaseOption = None,
    precision: Annotated[
        str | None, typer.Option(help=f"Comma list of {', '.join(f'{each.name} ({each.help})' for each in RECORDS)}.")
    ] = None,
    target: Annotated[
        str, typer.Option(help=f"Comma list of {', '.join(f'{name} ({use})' for name, use in TARGET_HELP.items())}.")
    ] = "ort",
    fusion: Annotated[
        Fusion | None,
        typer.Option(help="weighted (λ·router + (1−λ)·expert; the default, unless the router's fusion.json says more) or additive."),
    ] = None,
    lam: Annotated[
        float | None,
        typer.Option("--lambda", min=0.0, max=1.0, callback=parse_lambda, help="λ of the weighted fusion; default: the router's, or 0.5."),
    ] = None,
    max_seq_len: Annotated[int | None, typer.Option(min=2, help="KV capacity in tokens; default min(4096, the models').")] = None,
    calibration: Annotated[
        str, typer.Option(help="Prompts: 'builtin' or a .txt or .jsonl file; a saved calibration.safetensors; or 'none': round to nearest.")
    ] = "builtin",
    routing_head_key: Annotated[str, typer.Option(help="Name of the routing head's tensors in the router's safetensors.")] = "routing_head",
    out: Annotated[Path | None, typer.Option(help="Folder of the bundle; default dist/<family>.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle once the new one is complete.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail where a precision loses more than its bound; nothing is written then.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Export a FusionRoute system, a router LM and its expert LMs, into a bundle that the runtime generates from."""
    bundle = out or Path("dist") / family.name
    with one_sentence("export", MISSING, bundle, "nothing was written", debug):
        gpus, named_experts = parse_gpus(target), dict(parse_experts(expert or []))
        console = Console(stderr=True)
        with console.status("loading torch and transformers"):  # the schemes, which say what a target has, need torch
            targets = parse_targets(target)
            precisions = parse_precisions(precision, targets, family)
            router, experts = find_checkpoints(family, preset, router, named_experts)
            from fusionroute.fr_export.console.progress import Stages
            from fusionroute.fr_export.export import Request, export
        request = Request(
            family=family,
            router=router,
            experts=experts,
            precisions=precisions,
            targets=targets,
            out=bundle,
            fusion=fusion,
            lam=lam,
            max_seq_len=max_seq_len,
            calibration=calibration,
            head_key=routing_head_key,
            base=base,
            force=force,
            strict=strict,
            gpus=gpus,
        )
        stages = Stages(console)
        with stages.progress:
            report = export(request, stages)
    try:
        show(report, bundle, as_json)
    except BrokenPipeError:
        raise
    except OSError as error:
        fail(f"The bundle at {bundle} is complete, but its report cannot be printed ({error.strerror}); it is in report.json.", debug)


def show(report: dict[str, Any], bundle: Path, as_json: bool) -> None:
    """Print the report: one JSON object, or tables."""
    if as_json:
        print(json.dumps(report), flush=True)
    else:
        from fusionroute.fr_export.verify.report import show_report

        show_report(Console(), report, bundle)
