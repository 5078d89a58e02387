"""The command line of `export.py`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fusionroute.fr_export.families import FAMILIES
from fusionroute.runtime.command_errors import fail, one_sentence
from fusionroute.runtime.engine import FUSIONS
from fusionroute.runtime.errors import FusionError, InputError
from fusionroute.runtime.precisions import RECORDS
from fusionroute.runtime.tensorrt.library import parse_sms

ALIASES = {"ort": "ort:cpu", "rtx": "tensorrt"}
SMS = (86, 89, 120)  # what an engine is built for where no GPUs are named: GeForce RTX 30, 40 and 50


def parse_expert(text: str) -> tuple[str, str]:
    """`NAME=SRC` → (name, source)."""
    name, equals, source = text.partition("=")
    if not (equals and source and name.isidentifier()) or name in ("router", "fusion"):
        raise typer.BadParameter(
            f"'{text}' is not NAME=SRC with a plain name, such as --expert math=checkpoints/math", param_hint="--expert"
        )
    return name, source


def parse_experts(texts: list[str]) -> list[tuple[str, str]]:
    """Every --expert flag's name and source, in order; the names differ."""
    named = [parse_expert(text) for text in texts]
    if len({name for name, _ in named}) < len(named):
        raise typer.BadParameter("every expert needs a name of its own", param_hint="--expert")
    return named


def check_family(name: str) -> None:
    """Refuse a family that there is not."""
    if name not in FAMILIES:
        raise typer.BadParameter(f"unknown family '{name}'; expected {' or '.join(FAMILIES)}", param_hint="--family")


def parse_targets(text: str) -> tuple[str, ...]:
    """Comma list of targets, `ort` meaning `ort:cpu` and `rtx` the graphs of `tensorrt`."""
    from fusionroute.fr_export.precision import SCHEMES

    targets = tuple(dict.fromkeys(ALIASES.get(plain(name), name.strip()) for name in text.split(",")))
    for target in targets:
        if target not in SCHEMES:
            known = ", ".join(("ort", *SCHEMES, "rtx[:sm86+sm89+sm120]"))
            raise typer.BadParameter(f"unknown target '{target}'; this version exports {known}", param_hint="--target")
    return targets


def plain(name: str) -> str:
    """A target without the GPUs behind `rtx:`."""
    name = name.strip()
    return "rtx" if name.startswith("rtx:") else name


def parse_gpus(text: str) -> tuple[int, ...]:
    """The compute capabilities that `rtx:sm86+sm89` among the targets names; the usual ones for `rtx`, none without it."""
    found: list[int] = []
    for name in text.split(","):
        if plain(name) == "rtx":
            _, colon, gpus = name.strip().partition(":")
            try:
                found += parse_sms(gpus) if colon else SMS
            except InputError as error:
                raise typer.BadParameter(str(error).rstrip("."), param_hint="--target") from error
    return tuple(dict.fromkeys(found))


def parse_precisions(text: str | None, targets: tuple[str, ...], family: Any) -> tuple[str, ...]:
    """Comma list of precisions, or the family's defaults that the targets have. Each is exported for every target that has it."""
    from fusionroute.fr_export.precision import SCHEMES

    if text is None:
        wanted = ((target, p) for target in targets for p in family.precisions.get(target, family.precisions["other"]))
        return tuple(dict.fromkeys(precision for target, precision in wanted if precision in SCHEMES[target]))
    precisions = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
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


def main(
    family: Annotated[str, typer.Option(help=f"Model family: {' or '.join(FAMILIES)}.")],
    preset: Annotated[
        str | None,
        typer.Option(help="Named checkpoints: 'tiny' (ships with the package; the default) or 'paper' (hub ids)."),
    ] = None,
    router: Annotated[str | None, typer.Option(help="Router checkpoint: a folder or hub id, with a routing head.")] = None,
    expert: Annotated[list[str] | None, typer.Option(help="NAME=SRC; repeat per expert, in the order of the routing head's rows.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="Comma list of: " + "; ".join(f"{each.name} ({each.help})" for each in RECORDS) + ".")
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            help="Comma list of targets: ort (ONNX Runtime on CPU), ort:cuda (on GPUs), portable (for Optimum), tensorrt (graphs only), tensorrt:10.3 (for JetPack 6), rtx[:sm86+sm89+sm120] (and engines)."
        ),
    ] = "ort",
    fusion: Annotated[
        str | None,
        typer.Option(help="weighted (λ·router + (1−λ)·expert; the default, unless the router's fusion.json says more) or additive."),
    ] = None,
    lam: Annotated[
        float | None, typer.Option("--lambda", min=0.0, max=1.0, help="λ of the weighted fusion; default 0.5, likewise.")
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
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object on stdout, all else on stderr.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Export a FusionRoute system, a router LM and its expert LMs, into a bundle that the runtime generates from."""
    folder = out or Path("dist") / family
    missing = "The exporter needs the package '{}': install the extra 'export' (pip install 'fusionroute[export,cpu]')."
    with one_sentence("export", missing, folder, "nothing was written", debug):
        report = run(
            family,
            preset,
            router,
            expert or [],
            precision,
            target,
            fusion,
            lam,
            max_seq_len,
            calibration,
            routing_head_key,
            folder,
            force,
            strict,
        )
    try:
        show(report, folder, as_json)
    except BrokenPipeError:
        raise
    except OSError as error:
        fail(f"The bundle at {folder} is complete, but its report cannot be printed ({error.strerror}); it is in report.json.", debug)


def run(
    family: str, preset: str | None, router: str | None, expert: list[str], precision: str | None, target: str, fusion: str | None, lam: float | None,
    max_seq_len: int | None, calibration: str, head_key: str, out: Path, force: bool, strict: bool,
) -> dict[str, Any]:  # fmt: skip
    """Check the flags and export; returns the report."""
    check_family(family)
    if fusion is not None and fusion not in FUSIONS:
        raise typer.BadParameter(f"unknown fusion '{fusion}'; expected {' or '.join(FUSIONS)}", param_hint="--fusion")
    if lam is not None and not 0 <= lam <= 1:  # not a number: all others the flag's own range refuses
        raise typer.BadParameter(f"{lam} is not in the range 0<=x<=1.", param_hint="--lambda")
    named = parse_experts(expert)
    if preset not in (None, "tiny", "paper"):
        raise typer.BadParameter(f"unknown preset '{preset}'; expected tiny or paper", param_hint="--preset")
    if preset is None and (router is None) != (not named):
        raise typer.BadParameter("--router and --expert go together, unless --preset names the rest", param_hint="--router / --expert")
    chosen = FAMILIES[family]
    targets = parse_targets(target)
    precisions = parse_precisions(precision, targets, chosen)

    console = Console(stderr=True)
    with console.status("loading torch and transformers"):
        from fusionroute.fr_export.console.progress import Stages
        from fusionroute.fr_export.export import Request, export

    defaults = chosen.preset(preset or "tiny") if preset or router is None else None
    router_source = router or (defaults.router if defaults else None)
    if router_source is None:
        raise FusionError(f"No router is published for the preset '{preset}' of {family}: train one and name it with --router.")
    request = Request(
        family=chosen,
        router=router_source,
        experts=dict(named) if named else dict(defaults.experts if defaults else {}),
        precisions=precisions,
        targets=targets,
        out=out,
        fusion=fusion,
        lam=lam,
        max_seq_len=max_seq_len,
        calibration=calibration,
        head_key=head_key,
        force=force,
        strict=strict,
        gpus=parse_gpus(target),
    )
    stages = Stages(console)
    with stages.progress:
        return export(request, stages)


def show(report: dict[str, Any], folder: Path, as_json: bool) -> None:
    """Print the report."""
    if as_json:
        print(json.dumps(report), flush=True)
    else:
        from fusionroute.fr_export.verify.report import show_report

        show_report(Console(), report, folder)


def app(arguments: Sequence[str] | None = None, name: str | None = None) -> None:
    """Entry point, which always exits; for the arguments of the process where none are given. `name` is what help calls the command."""
    command = typer.Typer(add_completion=False)
    command.command()(main)
    command(args=arguments, prog_name=name)
