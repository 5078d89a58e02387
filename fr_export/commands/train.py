"""`fusionroute train`, `python -m fr_export.training`: train a router."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_args

import typer
from rich.console import Console
from rich.table import Table

from fusionroute.fr_export.commands.options import BaseOption, ExpertOptions, FamilyOption, parse_experts
from fusionroute.fr_export.training.recipe import (
    PRESETS,
    RANK,
    ComputePrecision,
    Dtype,
    Optimizer,
    PresetName,
    Recipe,
    Stage,
    StageName,
)
from fusionroute.runtime.command_errors import one_sentence
from fusionroute.runtime.commands.options import Debug, Json
from fusionroute.runtime.files import cache_folder
from fusionroute.runtime.tables import tables
from fusionroute.runtime.terminal import Terminal

T = TypeVar("T", int, float)
CACHE = cache_folder() / "scores"
FIGURES = ("steps", "seconds", "MiB", "LM loss", "routing", "DPO", "accuracy", "margin")


def main(
    router: Annotated[str, typer.Option(help="Where the router starts from: a model or LoRA adapter (the paper: the instruction expert).")],
    out: Annotated[Path | None, typer.Option(help="Folder of the trained router, as the exporter reads it.")] = None,
    family: FamilyOption = None,
    expert: ExpertOptions = None,
    base: BaseOption = None,
    direct: Annotated[bool, typer.Option("--direct", help="Plain fine-tuning, without experts and routing head.")] = False,
    sft: Annotated[Path | None, typer.Option(help='JSONL of {"prompt", "completion"} or {"messages"}.')] = None,
    preferences: Annotated[Path | None, typer.Option(help='JSONL of {"prompt", "chosen", "rejected"}.')] = None,
    stages: Annotated[str | None, typer.Option(help="Comma list of sft, cdpo, mixed; default by the data: sft, or sft,mixed.")] = None,
    preset: Annotated[PresetName, typer.Option(help="paper: lr 1e-5, 1 epoch. seed: lr 1e-3, 10 epochs, batch 32.")] = "paper",
    lr: Annotated[str | None, typer.Option(help="Learning rate, or a comma list with one per stage; default: the preset's.")] = None,
    head_lr: Annotated[str | None, typer.Option(help="That of the routing head; default: the same.")] = None,
    epochs: Annotated[str | None, typer.Option(help="Passes over the data, per stage.")] = None,
    max_steps: Annotated[str | None, typer.Option(help="Optimizer steps instead of epochs, per stage.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows (or pairs) per batch and device; default: the preset's.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(min=1, help="Instead: as many as fill this many padded tokens.")] = None,
    gradient_accumulation: Annotated[int, typer.Option(min=1, help="Batches per optimizer step and device.")] = Recipe.accumulation,
    beta: Annotated[float, typer.Option(min=0.0, help="β of CDPO.")] = Recipe.beta,
    routing_weight: Annotated[float, typer.Option(min=0.0, help="λ, the weight of the routing loss.")] = Recipe.routing_weight,
    lora: Annotated[
        bool | None, typer.Option("--lora/--full", help="Train LoRA adapters, or all weights; default: adapters of large models.")
    ] = None,
    lora_rank: Annotated[int | None, typer.Option(min=0, help=f"Of the adapters, default {RANK}; 0: all weights.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Write a whole model, with the adapters merged into it.")] = False,
    optimizer: Annotated[Optimizer, typer.Option(help="muon trains matrices with Muon, the rest with AdamW.")] = Recipe.optimizer,
    warmup: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the steps; then a cosine to zero.")] = Recipe.warmup,
    max_length: Annotated[int, typer.Option(min=2, help="Longer rows (in tokens) are skipped.")] = Recipe.max_length,
    precision: Annotated[ComputePrecision | None, typer.Option(help="bf16 is autocast; default bf16 on a GPU, else fp32.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the written weights; default: the source's.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of the data and of new adapters.")] = Recipe.seed,
    cache: Annotated[Path, typer.Option(help="Where the experts' log-probabilities are kept for further runs.")] = CACHE,
    keep_stages: Annotated[
        bool, typer.Option("--keep-stages", help="Also write the router after each earlier stage, to OUT/stages.")
    ] = False,
    checkpoint_every: Annotated[int | None, typer.Option(min=1, help="Optimizer steps between checkpoints (in OUT.unfinished).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of an interrupted run.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a router trained before, once the new one is complete.")] = False,
    check_data: Annotated[bool, typer.Option("--check-data", help="Only check the data: every wrong line and field, lengths.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a FusionRoute router (arXiv:2601.05106) from a causal LM and frozen experts, for the exporter."""
    missing = "Training needs the package '{}': install the extras (pip install 'fusionroute[export,train]')."
    left = "resume it with --resume" if checkpoint_every is not None else "nothing was written"
    with one_sentence("training", missing, out, left, debug):
        if sft is None and preferences is None:
            raise typer.BadParameter("no data: name a file", param_hint="--sft / --preferences")
        if check_data:
            from fusionroute.fr_export.commands.data_report import show_data
            from fusionroute.fr_export.training.check_data import check_data as check

            show_data(check(router, sft, preferences, max_length, base), as_json)
            return
        if out is None:
            raise typer.BadParameter("name the folder of the trained router", param_hint="--out")
        experts = parse_experts(expert or [])
        if direct == bool(experts):
            raise typer.BadParameter("name the experts, or add --direct for a model without any", param_hint="--expert / --direct")
        if batch_size is not None and batch_tokens is not None:
            raise typer.BadParameter("both given; choose one", param_hint="--batch-size / --batch-tokens")
        if lora is not None and lora_rank is not None and lora != bool(lora_rank):
            raise typer.BadParameter(
                f"rank {lora_rank} says the opposite; leave one of them out", param_hint="--lora / --full / --lora-rank"
            )
        numbers = PRESETS[preset]
        names = stage_names(stages or ("sft,mixed" if sft and preferences else "sft" if sft else "cdpo"))
        columns = zip(
            names,
            (rate or numbers.learning_rate for rate in per_stage(lr, float, len(names), "--lr")),
            per_stage(head_lr, float, len(names), "--head-lr"),
            (passes or numbers.epochs for passes in per_stage(epochs, int, len(names), "--epochs")),
            per_stage(max_steps, int, len(names), "--max-steps"),
            strict=True,
        )
        console = Terminal(stderr=True)
        with console.status("loading torch and transformers"):
            import torch
            from accelerate import PartialState

            from fusionroute.fr_export.console.progress import Stages
            from fusionroute.fr_export.training.request import TrainingRequest
            from fusionroute.fr_export.training.train import train
        recipe = Recipe(
            stages=tuple(Stage(*column) for column in columns),
            batch_size=batch_size or numbers.batch_size,
            batch_tokens=batch_tokens,
            accumulation=gradient_accumulation,
            optimizer=optimizer,
            warmup=warmup,
            beta=beta,
            routing_weight=routing_weight,
            lora_rank=lora_rank if lora_rank is not None or lora is None else RANK if lora else 0,
            max_length=max_length,
            precision=precision or ("bf16" if torch.cuda.is_available() else "fp32"),
            seed=seed,
        )
        request = TrainingRequest(
            family=family,
            router=router,
            base=base,
            out=out,
            recipe=recipe,
            experts=dict(experts),
            sft=sft,
            preferences=preferences,
            cache=cache,
            dtype=dtype,
            merge=merge,
            keep_stages=keep_stages,
            checkpoint_every=checkpoint_every,
            resume=resume,
            force=force,
        )
        display = Stages(console)
        with display.progress:
            report = train(request, display)
        if PartialState().is_main_process:
            show(report, as_json)


def stage_names(text: str) -> list[StageName]:
    """The names of a comma list of stages."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in get_args(StageName):
            raise typer.BadParameter(f"unknown '{name}'; expected {', '.join(get_args(StageName))}", param_hint="--stages")
    return cast(list[StageName], names)


def per_stage(text: str | None, kind: type[T], stages: int, hint: str) -> Sequence[T | None]:
    """One value for all stages or a comma list with one for each; None for each where the option was not given."""
    if text is None:
        return [None] * stages
    try:
        values: list[T] = [kind(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"'{text}' is no comma list of {'whole ' if kind is int else ''}numbers", param_hint=hint) from None
    if not all(value > 0 for value in values):
        raise typer.BadParameter(f"'{text}' must be above 0", param_hint=hint)
    if len(values) not in (1, stages):
        raise typer.BadParameter(f"{len(values)} values for {stages} stages; expected one, or one for each", param_hint=hint)
    return values * stages if len(values) == 1 else values


def show(report: Any, as_json: bool) -> None:
    """Print the report as JSON, or as a table with the last point of each stage's loss curve."""
    if as_json:
        print(json.dumps(asdict(report)), flush=True)
        return
    console = Terminal()
    console.print(*stage_tables(console, report.stages))
    skipped = f", {report.skipped} skipped as too long" if report.skipped else ""
    console.print(f"{report.out}: {report.rows} samples and {report.pairs} preferences learnt from{skipped}")


def stage_tables(console: Console, stages: Sequence[dict[str, Any]]) -> list[Table]:
    """One row per stage."""
    rows = []
    for stage in stages:
        last = [stage["last"].get(name) for name in ("lm_loss", "routing_loss", "dpo_loss", "reward_accuracy", "reward_margin")]
        losses = ("–" if value is None else f"{value:.3f}" for value in last)
        rows.append((stage["name"], str(stage["steps"]), f"{stage['seconds']:.1f}", f"{stage['peak_mib']:.0f}", *losses))
    return tables(console, "", ("stage",), FIGURES, rows)
