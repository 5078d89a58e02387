"""`fusionroute evaluate`, `python -m fr_export.evaluate`: task accuracy of bundles by several decoding methods.

Needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fusionroute.fr_export.evaluation.methods import check
from fusionroute.fr_export.evaluation.questions import Questions, read_questions
from fusionroute.fr_export.evaluation.report import shown
from fusionroute.fr_export.evaluation.study import EvaluationRequest, expanded, run
from fusionroute.fr_export.tasks.domains import ALL_DOMAINS, Split, draw_many
from fusionroute.runtime.command_errors import one_sentence
from fusionroute.runtime.commands.options import Debug, Json, Trust, VerifyKey, names
from fusionroute.runtime.errors import InputError, UnavailableError
from fusionroute.runtime.manifest import Fusion, Manifest
from fusionroute.runtime.terminal import Terminal, print_json

METHODS = "fused,token,router,experts,sequence,sequence-routed,collab"


def main(
    bundle: Annotated[list[Path], typer.Argument(metavar="BUNDLE", help="Folders that export.py wrote.")],
    methods: Annotated[
        str,
        typer.Option(help="Comma list; also expert:NAME (experts: all of them) and lambda:X. The first is what others are compared with."),
    ] = METHODS,
    precision: Annotated[str | None, typer.Option(help="Comma list, such as fp32,int8; default: the fastest in the bundle.")] = None,
    tasks: Annotated[str, typer.Option(help='builtin, or a file of JSON lines {"prompt", "answer", "domain"}.')] = "builtin",
    split: Annotated[Literal["test", "validation"], typer.Option(help="Of the builtin tasks.")] = "test",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts per domain, at most.")] = 500,
    domains: Annotated[str | None, typer.Option(help="Comma list; default: all.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts into the chat template as the user's message.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes, each with one thread; default: one per core.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of prompts and the bootstrap.")] = 0,
    lam: Annotated[float | None, typer.Option("--lambda", min=0.0, max=1.0, help="λ of the method fused; default as exported.")] = None,
    fusion: Annotated[Fusion | None, typer.Option(help="Of the method fused; default as exported.")] = None,
    sweep_lambda: Annotated[bool, typer.Option("--sweep-lambda", help="Also measure λ = 0, 0.1, …, 1 and draw the curve.")] = False,
    tune: Annotated[bool, typer.Option("--tune", help="First choose λ on the validation split and write it into the bundle.")] = False,
    verify_key: VerifyKey = None,
    out: Annotated[Path, typer.Option(help="Folder for results.json and the pictures.")] = Path("evaluation"),
    trust: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure exact match, F1 and BLEU of exported bundles by several decoding methods, with bootstrap intervals."""
    missing = "Evaluating needs the package '{}': install the extra 'train' (pip install 'fusionroute[train]')."
    with one_sentence("evaluation", missing, out, "", debug, interrupted="no results were written"):
        for package in ("matplotlib", "sacrebleu"):
            if find_spec(package) is None:
                raise UnavailableError(missing.format(package))
        if tune and (fusion is not None or lam is not None):
            raise typer.BadParameter("λ cannot be both chosen and given", param_hint="--tune / --fusion / --lambda")
        if tune and verify_key is not None:
            raise typer.BadParameter(
                "λ is written into the manifest, which ends its signature: tune first, then sign", param_hint="--tune / --verify-key"
            )
        request = EvaluationRequest(
            bundles=tuple(bundle),
            precisions=names(precision) if precision else (None,),
            methods=choose_methods(methods, bundle),
            questions=choose_questions(tasks, split, prompts, domains, seed),
            out=out,
            source=f"builtin {split}" if tasks == "builtin" else tasks,
            tuning=choose_questions(tasks, "validation", prompts, domains, seed) if tune else None,
            sweep=sweep_lambda,
            chat=chat,
            jobs=jobs,
            seed=seed,
            lam=lam,
            fusion=fusion,
            trusted=trust,
            verify_key=verify_key,
        )
        report = run(request, Terminal(stderr=True))
        show(report, out, as_json)


def choose_methods(text: str, bundles: Sequence[Path]) -> tuple[str, ...]:
    """The methods of a comma list. All bundles must have the experts that it names."""
    methods = names(text)
    for bundle in bundles:
        experts = Manifest.read(bundle).experts
        try:
            for name in expanded(methods, experts):
                check(name, experts)
        except InputError as error:
            raise typer.BadParameter(str(error), param_hint="--methods") from error
    return methods


def choose_questions(source: str, split: Split, count: int, domains: str | None, seed: int) -> Questions:
    """Questions by domain, drawn from a split of the builtin tasks, or read from a file, which has no splits."""
    from_file = None if source == "builtin" else read_questions(Path(source), count, seed)
    available = ALL_DOMAINS if from_file is None else tuple(from_file)
    chosen = names(domains) if domains else available
    if unknown := [name for name in chosen if name not in available]:
        raise typer.BadParameter(f"unknown domain '{unknown[0]}'; expected some of {', '.join(available)}", param_hint="--domains")
    return {name: draw_many(name, split, count, seed) if from_file is None else from_file[name] for name in chosen}


def show(report: dict[str, Any], out: Path, as_json: bool) -> None:
    """Print the report as JSON or as tables."""
    if as_json:
        print_json(report)
        return
    console = Terminal()
    console.print(*shown(console, report["rows"]))
    for label, curve in report["lambda_curves"].items():
        console.print(f"{label}: " + ", ".join(f"λ {lam:g} {value:.1%}" for lam, value in curve))
    console.print(f"results.json and pictures: {out}")
