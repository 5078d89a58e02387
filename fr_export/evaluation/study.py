"""Whole evaluations: several bundles, precisions and methods on the same questions.

λ is tuned or swept; numbers and pictures go to a folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fusionroute.fr_export.evaluation import figures, lambdas
from fusionroute.fr_export.evaluation.outcomes import Results
from fusionroute.fr_export.evaluation.questions import Questions
from fusionroute.fr_export.evaluation.report import Row, summary
from fusionroute.fr_export.evaluation.run import evaluate
from fusionroute.runtime.backends.ort_cpu import TARGET
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.errors import InputError
from fusionroute.runtime.files import replace

# led by the router: the picture shows the routing of the first of them that was evaluated
ROUTED = ("fused", "token", "router")


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate: every method on every precision of every bundle.

    The method "experts" stands for all `expert:NAME`, the precision None for the fastest of the bundle. Where `tuning`
    questions are given, λ is chosen on them first. `source` names the questions in results.json. `lam` and `fusion` are
    those of the method `fused`. `verify_key`: of those who signed the bundles, and `trusted`, as of `FusionRuntime.load`.
    """

    bundles: tuple[Path, ...]
    precisions: tuple[str | None, ...]
    methods: tuple[str, ...]
    questions: Questions
    out: Path
    source: str = ""
    tuning: Questions | None = None
    sweep: bool = False
    chat: bool = False
    jobs: int | None = None
    seed: int = 0
    lam: float | None = None
    fusion: str | None = None
    verify_key: Path | None = None
    trusted: bool = False


def run(request: EvaluationRequest, console: Console) -> dict[str, Any]:
    """Evaluate and write results.json and the pictures to `request.out`; returns what results.json holds.

    Tuning measures the first precision and writes λ and its curve into the bundle. Raises FusionError subclasses and
    OSError.
    """
    bundles = [Bundle.open(folder, request.verify_key) for folder in request.bundles]
    for bundle in bundles:  # an error in the last one must show before the first one is evaluated
        for precision in request.precisions:
            bundle.variant(TARGET, precision)
        if request.tuning and bundle.manifest.fusion == "additive":
            raise InputError(f"The bundle {bundle.folder} fuses additively, which has no λ to tune: export it with --fusion weighted.")
    request.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    curves: dict[str, lambdas.Curve] = {}
    for bundle, name in zip(bundles, _names(request.bundles), strict=True):
        methods = expanded(request.methods, bundle.manifest.experts)
        for number, precision_or_none in enumerate(request.precisions):
            precision = bundle.variant(TARGET, precision_or_none).precision
            if request.tuning and not number:
                curve = lambdas.curve(_measured(request, bundle, precision, lambdas.methods(), request.tuning, console))
                lambdas.write(bundle.folder, curve)
                curves[f"{name} {precision}, for tuning"] = curve
            swept = lambdas.methods() if request.sweep else []
            results = _measured(request, bundle, precision, [*methods, *swept], request.questions, console)
            if request.sweep:
                curves[f"{name} {precision}"] = lambdas.curve(results)
            rows += [Row(name, precision, method, results[method]) for method in methods]
    return _write(request, rows, curves)


def _measured(
    request: EvaluationRequest, bundle: Bundle, precision: str, methods: Sequence[str], questions: Questions, console: Console
) -> Results:
    return evaluate(
        bundle.folder, precision, methods, questions, jobs=request.jobs, fusion=request.fusion, lam=request.lam, chat=request.chat,
        console=console, verify_key=request.verify_key, trusted=request.trusted,
    )  # fmt: skip


def expanded(methods: Sequence[str], experts: Sequence[str]) -> list[str]:
    """Names of methods, each once; "experts" becomes `expert:NAME` for every expert."""
    every = [f"expert:{name}" for name in experts]
    return list(dict.fromkeys(one for name in methods for one in (every if name == "experts" else [name])))


def _names(folders: Sequence[Path]) -> list[str]:
    """Folder names, or whole paths where two are the same."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _write(request: EvaluationRequest, rows: Sequence[Row], curves: dict[str, lambdas.Curve]) -> dict[str, Any]:
    settings = {"tasks": request.source, "chat": request.chat, "seed": request.seed, "lambda": request.lam, "fusion": request.fusion}
    entries = summary(rows, request.questions, request.seed)
    report = {"settings": settings, "rows": entries, "lambda_curves": curves}
    routed = {(row.bundle, row.precision): row for method in reversed(ROUTED) for row in rows if row.method == method}
    pictures = {
        "accuracy.png": figures.accuracy(entries),
        "lambda.png": figures.lambda_curves(curves) if curves else None,
        "routing.png": figures.routing_maps([*routed.values()]) if routed else None,
    }
    for name, content in pictures.items():
        if content is None:
            (request.out / name).unlink(missing_ok=True)  # one of an earlier evaluation
        else:
            replace(request.out / name, content)
    replace(request.out / "results.json", (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
    return report
