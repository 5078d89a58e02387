"""The export in order: check → trace → calibrate → write variants → describe → build engines → compare → report."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from fusionroute.calibration.prompts import Parts, load_parts
from fusionroute.fr_export.bundle.describe import describe, with_file, write_common_files
from fusionroute.fr_export.bundle.disk_space import check_space
from fusionroute.fr_export.bundle.early_refusals import refuse
from fusionroute.fr_export.bundle.engines import add_engines
from fusionroute.fr_export.bundle.pair_variant import PairVariantWriter
from fusionroute.fr_export.bundle.recording import calibration_table
from fusionroute.fr_export.bundle.shared_base import approximations, close_enough, deltas
from fusionroute.fr_export.bundle.staged_folder import StagedBundle
from fusionroute.fr_export.bundle.targets import TARGETS
from fusionroute.fr_export.bundle.variant import VariantWriter, stored_as
from fusionroute.fr_export.checkpoints.deltas import Delta
from fusionroute.fr_export.checkpoints.fusion_settings import FusionSettings
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.families import Family
from fusionroute.fr_export.forecast.forecast import Forecast, check_memory
from fusionroute.fr_export.graphs.traces import Traces
from fusionroute.fr_export.precision import SCHEMES, Scheme
from fusionroute.fr_export.precision.evidence import evidence
from fusionroute.fr_export.precision.kept_matrices import KeptMatrices
from fusionroute.fr_export.precision.rank_budget import RankBudget
from fusionroute.fr_export.precision.scheme import Fitting
from fusionroute.fr_export.verify.bounds import refuse_missed
from fusionroute.fr_export.verify.measure import measure
from fusionroute.fr_export.verify.report import NAME as REPORT
from fusionroute.fr_export.verify.report import build_report, write_report
from fusionroute.runtime.errors import InputError
from fusionroute.runtime.kv_precisions import KV_PRECISIONS, KvName, refusal
from fusionroute.runtime.precisions import PRECISIONS

TABLE = "calibration.safetensors"


@dataclass(frozen=True)
class Request:
    """What to export. Each field is checked by itself; what must fit together is checked by `export`."""

    family: Family | None  # the router's; None: the one that its config names
    router: str  # a whole model, or an adapter
    experts: dict[str, str]  # name → source, in the order of the routing head's rows
    precisions: tuple[str, ...]
    targets: tuple[str, ...]
    out: Path
    fusion: str | None = None  # None: what the router folder says, else weighted with λ = 0.5
    lam: float | None = None
    max_seq_len: int | None = None
    calibration: str = "builtin"
    head_key: str = "routing_head"
    base: str | None = None  # of all adapters; None: the one that each names
    force: bool = False
    strict: bool = False  # a precision that misses its bound is an error
    gpus: tuple[int, ...] = ()  # compute capabilities that TensorRT-RTX engines are built for
    shared_base: bool = False  # one graph for all models: the router's, and what experts add to it
    leave_apart: bool = False  # with shared_base: experts that cannot share have graphs of their own
    budget: RankBudget | None = None  # of the factors that approximate full fine-tunes; None: these cannot share
    kv: KvName | None = None  # the precision of keys and values; None: that of the activations
    compare: int | None = None  # tokens to compare on; 0: do not compare; None: what takes a tenth of the time


@dataclass(frozen=True)
class Checked:
    """A request that can be exported, as far as one can know before: its variants, checkpoints, prompts, and forecast.

    `deltas`: what each expert adds to the router, where all models share one base.
    """

    plan: list[tuple[str, Scheme]]
    system: System
    deltas: dict[str, Delta] | None
    prompts: Parts
    fusion: FusionSettings
    forecast: Forecast


def check(request: Request, stages: Stages) -> Checked:
    """Open everything that a request names and refuse what does not fit. Changes nothing. Raises FusionError."""
    refuse(request.out, request.force, request.calibration, request.experts, request.gpus, request.precisions, request.kv)
    chosen = [(target, name) for target in request.targets for name in request.precisions if name in SCHEMES[target]]
    if request.kv is not None and (reason := refusal(request.kv, request.targets)) is not None:
        raise InputError(f"{reason}.")
    if request.calibration == "none" and request.kv is not None and KV_PRECISIONS[request.kv].quantised:
        raise InputError(f"Keys and values in {request.kv} need the scales of calibration: leave out calibration='none', or kv.")
    if request.calibration == "none" and (needy := [pair for pair in chosen if pair[0] in PRECISIONS[pair[1]].calibrated_on]):
        raise InputError(
            f"{needy[0][1]} for {needy[0][0]} needs the scales of calibration: leave out calibration='none', or name other precisions."
        )
    plan = [(target, SCHEMES[target][name]) for target, name in chosen]
    with stages.stage("checking the checkpoints"):
        system = System.open(request.family, request.router, request.experts, request.head_key, request.max_seq_len, request.base)
        shared = deltas(system, request.budget is not None, request.leave_apart) if request.shared_base else None
        prompts = load_parts(request.calibration)
        fusion = FusionSettings.read(system.router.folder).replaced(request.fusion, request.lam)
        forecast = Forecast.of(
            system, shared, request.budget, plan, prompts.calibration, request.calibration, len(request.gpus), request.out, request.compare
        )
        check_space(forecast.disk_needed, forecast.disk_free, request.out)
        check_memory(forecast, psutil.virtual_memory().total + psutil.swap_memory().total)
    return Checked(plan, system, shared, prompts, fusion, forecast)


def export(request: Request, stages: Stages) -> dict[str, Any]:
    """Export a system into a bundle at `request.out`, which appears only when it is complete. Returns the report.

    Raises FusionError for everything that the user can mend, and leaves nothing half-written behind. What calibration and
    rounding have finished lies in the user's cache folder until an export of the same inputs succeeds, and goes on there.
    """
    kept = KeptMatrices()
    with StagedBundle(request.out, request.force) as staging:
        folder = staging.folder
        checked = check(request, stages)
        kept.reserve = checked.forecast.disk_needed
        plan, system, prompts, fusion = checked.plan, checked.system, checked.prompts, checked.fusion
        notes = [prompts.note] if prompts.note else []
        for note in [*notes, *(f"{model.name}: {note}." for model in system.models for note in model.notes)]:
            stages.note(note)

        traces = Traces(system, stages)
        first = TARGETS[request.targets[0]]
        graphs = traces.of(first.dialect if checked.deltas is None or first.pair is None else first.pair.dialect)

        known, shared = {}, checked.deltas
        fitted = any(isinstance(scheme, Fitting) for _, scheme in plan) or any(delta.matrices for delta in (shared or {}).values())
        fitted = fitted or stored_as(request.kv) is not None
        if request.calibration != "none" and fitted:
            table = calibration_table(system, shared or {}, traces, fusion, request.calibration, prompts.calibration, folder, stages)
            table.save(folder / TABLE)
            known = evidence(table)

        approximated = approximations(system, shared, request.budget, traces, known, stages) if shared and request.budget else {}
        if shared is not None:
            shared = close_enough(system, shared, approximated, request.leave_apart)
        writer = (
            VariantWriter(system, traces, known, folder, stages, kept=kept, kv=request.kv)
            if shared is None
            else PairVariantWriter(system, shared, approximated, traces, known, folder, stages, kept, request.kv)
        )
        written = [writer.write(target, scheme) for target, scheme in plan]
        variants = [each.variant for each in written]
        weights = writer.gather_weights(variants)

        write_common_files(system.router, folder)
        manifest = describe(system, fusion, graphs, variants, weights, folder)
        if request.gpus:
            manifest = add_engines(manifest, request.gpus, folder, stages)

        sources = {model.name: replace(model.source, notes=model.notes) for model in system.models}
        figures, reason = measure(system, manifest, prompts.held_out, folder, stages, checked.forecast.compared_tokens)
        ranks = {name: each.ranks for name, each in approximated.items()}
        report = build_report(manifest, [each.fitted for each in written], figures, reason, notes, folder, sources, ranks)
        if request.strict:
            refuse_missed(report)
        report["stages"] = stages.report()
        write_report(folder, report)
        with_file(manifest, folder, REPORT).write(folder)
    kept.remove()
    return report
