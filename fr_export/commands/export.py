"""`python export.py`, `fusionroute export`: the flags of the exporter, read straight into a `Request`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fusionroute.fr_export.bundle.staged_folder import StagedBundle
from fusionroute.fr_export.checkpoints.config_file import detect_family
from fusionroute.fr_export.commands.options import BaseOption, ExpertOptions, FamilyOption, parse_experts
from fusionroute.fr_export.commands.variants import (
    TARGET_HELP,
    check_calibration,
    check_kv,
    check_precisions,
    check_shared_base,
    default_folder,
    parse_budget,
    parse_compare,
    parse_gpus,
    parse_precisions,
    parse_targets,
)
from fusionroute.fr_export.console.log import logging_to
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.families import Family
from fusionroute.runtime.command_errors import fail, one_sentence
from fusionroute.runtime.commands.options import Debug, Json, names
from fusionroute.runtime.commands.verbs import Version
from fusionroute.runtime.errors import FusionError
from fusionroute.runtime.kv_precisions import KvName
from fusionroute.runtime.manifest import Fusion
from fusionroute.runtime.precisions import RECORDS
from fusionroute.runtime.terminal import Terminal

MISSING = "The exporter needs the package '{}': install the extra 'export' (pip install 'fusionroute[export,cpu]')."


def parse_lambda(value: float | None) -> float | None:
    """λ, which the flag's own range has checked but for NaN."""
    if value is not None and not 0 <= value <= 1:
        raise typer.BadParameter(f"{value} is not in the range 0<=x<=1.", param_hint="--lambda")
    return value


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
    auto: Annotated[Literal["auto"] | None, typer.Argument(hidden=True)] = None,
    family: FamilyOption = None,
    preset: Annotated[
        Literal["tiny", "tiny-shared", "paper"] | None,
        typer.Option(
            help="Named checkpoints: tiny (ships with the package; the default), tiny-shared (so does it; LoRA adapters of one "
            "base, for --shared-base) or paper (hub ids)."
        ),
    ] = None,
    router: Annotated[str | None, typer.Option(help="Router checkpoint: a folder or hub id, with a routing head.")] = None,
    expert: ExpertOptions = None,
    base: BaseOption = None,
    shared_base: Annotated[
        bool,
        typer.Option(
            "--shared-base",
            help="One graph for all models, which are fine-tunes of one base: it is stored and read once. "
            "--shared-base auto: what cannot share stands in full beside it.",
        ),
    ] = False,
    rank: Annotated[
        int | None, typer.Option(min=1, help="With --shared-base: approximate full fine-tunes by factors of this rank.")
    ] = None,
    delta_bits: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="With --shared-base: or by so many bits per weight of the base, spread over the matrices where they gain most."
        ),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help=f"Comma list of {', '.join(f'{each.name} ({each.help})' for each in RECORDS)}.")
    ] = None,
    target: Annotated[
        str, typer.Option(help=f"Comma list of {', '.join(f'{name} ({use})' for name, use in TARGET_HELP.items())}.")
    ] = "ort",
    kv: Annotated[
        KvName | None,
        typer.Option(help="Precision of keys and values (for ort on CPU: fp32, int8 or int4); default: that of the activations."),
    ] = None,
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
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS|none",
            help="How much text to compare each precision with torch on; default: as much as takes a tenth of the export's time.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show sizes, memory and time that the export would take, write nothing.")
    ] = False,
    log: Annotated[
        Path | None, typer.Option(help="Write what happens when, versions, and the traceback of a failure to this file.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
    version: Version = False,
) -> None:
    """Export a FusionRoute system, a router LM and its expert LMs, into a bundle that the runtime generates from."""
    with one_sentence("export", MISSING, out, "nothing was written", debug):
        # All that can be refused without torch is refused before it is loaded.
        gpus, targets, named_experts = parse_gpus(target), parse_targets(target), dict(parse_experts(expert or []))
        if precision is not None:
            check_precisions(names(precision), targets)
        if auto and not shared_base:
            raise typer.BadParameter("auto says what --shared-base does; name both, or neither", param_hint="--shared-base auto")
        budget = parse_budget(shared_base, rank, delta_bits)
        if shared_base:
            check_shared_base(targets, adapters_only=budget is None and not auto)
        check_kv(kv, targets, calibration)
        tokens = parse_compare(compare)
        if strict and tokens == 0:
            raise typer.BadParameter("a precision that is not compared cannot be held to its bound", param_hint="--strict / --compare none")
        if out is not None:
            StagedBundle(out, force).refuse()  # before a router is downloaded that tells the family
        family = family or family_of_router(router, base)
        precisions = parse_precisions(precision, targets, family)
        check_calibration(calibration, precisions, targets)
        router, experts = find_checkpoints(family, preset, router, named_experts)
        bundle = out or default_folder(family)
        from fusionroute.fr_export.bundle.early_refusals import refuse

        refuse(bundle, force, calibration, experts, gpus, precisions, kv)
        with logging_to(log, bundle) as entries:
            stages = Stages(Terminal(stderr=True), entries)
            with stages.progress:
                with stages.stage("loading torch and transformers"):
                    from fusionroute.fr_export.export import Request, check, export
                    from fusionroute.fr_export.precision.rank_budget import RankBudget
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
                    shared_base=shared_base,
                    leave_apart=auto is not None,
                    budget=None if budget is None else RankBudget(*budget),
                    kv=kv,
                    compare=tokens,
                )
                report = asdict(check(request, stages).forecast) if dry_run else export(request, stages)
    try:
        show(report, bundle, as_json, dry_run)
    except BrokenPipeError:
        raise
    except OSError as error:
        state = "Nothing was written, and the plan" if dry_run else f"The bundle at {bundle} is complete, but its report"
        rest = "" if dry_run else "; it is in report.json"
        fail(f"{state} cannot be printed ({error.strerror}){rest}.", debug)


def family_of_router(router: str | None, base: str | None) -> Family:
    """The family that the config of `--router` names, where none is named on the command line."""
    if router is None:
        raise typer.BadParameter("name the model family, or with --router a checkpoint, whose config.json names it", param_hint="--family")
    return detect_family(router, base)


def show(report: dict[str, Any], bundle: Path, as_json: bool, dry_run: bool) -> None:
    """Print the report or the plan: one JSON object, or tables."""
    if as_json:
        print(json.dumps(report), flush=True)
    elif dry_run:
        from fusionroute.fr_export.forecast.table import show_forecast

        show_forecast(Terminal(), report, bundle)
    else:
        from fusionroute.fr_export.verify.report import show_report

        show_report(Terminal(), report, bundle)
