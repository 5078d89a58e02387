"""The whole way once: checkpoints → trace → passes → precision → bundle → comparison → report."""

import functools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from fusionroute.calibration.prompts import Parts, load_parts
from fusionroute.calibration.table import Table
from fusionroute.fr_export.bundle.disk_space import check_space
from fusionroute.fr_export.bundle.staged_folder import Staging
from fusionroute.fr_export.bundle.targets import GRAPHS, TARGETS
from fusionroute.fr_export.bundle.weight_traffic import weight_bytes
from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.checkpoints.fusion_settings import FusionSettings
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.families import Family
from fusionroute.fr_export.graphs.dialects import Dialect, ort
from fusionroute.fr_export.graphs.fusion_graph import write_fusion_graph
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.trace import architecture, trace
from fusionroute.fr_export.graphs.weight_store import FOLDER, Store
from fusionroute.fr_export.precision import SCHEMES, Scheme
from fusionroute.fr_export.precision.bind_weights import bind
from fusionroute.fr_export.precision.calibrate import cache_folder, calibrate, check
from fusionroute.fr_export.precision.evidence import Evidence, evidence
from fusionroute.fr_export.precision.fit_context import FitContext, Shared
from fusionroute.fr_export.precision.int4 import LEAN, Int4
from fusionroute.fr_export.precision.scheme import Fitting
from fusionroute.fr_export.verify.bounds import misses
from fusionroute.fr_export.verify.compare import TOKENS, compare, compare_scores, sequences
from fusionroute.fr_export.verify.engine_graph_on_cpu import System as InPlaceSystem
from fusionroute.fr_export.verify.report import write_report
from fusionroute.fr_export.verify.torch_reference import reference
from fusionroute.runtime import FusionRuntime, manifest
from fusionroute.runtime.backends.ort_cpu import TARGET as CPU
from fusionroute.runtime.bundle import ELSEWHERE, sha256
from fusionroute.runtime.errors import FusionError, InputError
from fusionroute.runtime.tensorrt.engines import OLDER, rebuild
from fusionroute.runtime.tensorrt.engines import TARGET as ENGINES_OF
from fusionroute.runtime.tensorrt.library import capabilities, load

FUSION_GRAPH = f"{GRAPHS}/fusion.onnx"
TABLE = "calibration.safetensors"
RECORDED = SCHEMES["ort:cpu"]["int8"]  # what the calibration texts are generated with
RECORDED_LARGE, LARGE = Int4(LEAN, LEAN), 3_000_000_000  # and from how many parameters on, since the runtime holds all models in memory
REFERENCE_LIMIT = 1 << 30  # bytes of one model in fp32 up to which the whole of it is loaded into torch for the comparison


@dataclass(frozen=True)
class Request:
    """What the user asked for, checked as far as one flag at a time can be."""

    family: Family
    router: str
    experts: dict[str, str]
    precisions: tuple[str, ...]
    targets: tuple[str, ...]
    out: Path
    fusion: str | None = None  # None: what the router folder says, else weighted with λ = 0.5
    lam: float | None = None
    max_seq_len: int | None = None
    calibration: str = "builtin"
    head_key: str = "routing_head"
    force: bool = False
    strict: bool = False  # a precision that misses its bound is an error
    gpus: tuple[int, ...] = ()  # compute capabilities that TensorRT-RTX engines are built for


def export(request: Request, stages: Stages) -> dict[str, Any]:
    """Export a system into a bundle at `request.out`, which appears only when complete. Returns the report.

    Raises FusionError subclasses for everything the user can mend; nothing half-written is left behind.
    """
    with Staging(request.out, request.force) as staging:
        if request.gpus:
            capabilities(load("rtx"), request.gpus)  # what is missing is found here, not after an hour of writing
        with stages.stage("checking the checkpoints"):
            system = System.open(request.family, request.router, request.experts, request.head_key, request.max_seq_len)
            parts = load_parts(request.calibration)
            fusion = FusionSettings.read(system.router.folder).replaced(request.fusion, request.lam)
            check_space(system, request.precisions, request.targets, bool(request.gpus), staging.folder, request.out)
        traced = functools.cache(lambda dialect: traces(system, stages, dialect))
        graphs: dict[str, Graph] = traced(TARGETS[request.targets[0]].dialect)
        folder = staging.folder
        stores = functools.cache(Store)  # one per folder that holds graphs
        stores(folder / GRAPHS)
        write_fusion_graph(folder / FUSION_GRAPH)
        wanted = [(target, SCHEMES[target][name]) for target in request.targets for name in request.precisions if name in SCHEMES[target]]
        table = None
        if request.calibration != "none" and any(isinstance(scheme, Fitting) for _, scheme in wanted):
            table = learn(system, traced(ort), fusion, request.calibration, parts, folder, stages)
            table.save(folder / TABLE)
        known = evidence(table) if table else {}
        firsts = dict(reversed(wanted))
        written = [
            write_variant(system, traced, target, scheme, known, folder, stores, stages, scheme is firsts[target])
            for target, scheme in wanted
        ]  # fmt: skip
        variants = [variant for variant, _ in written]
        keep({path for variant in variants for path in reads(variant, folder)}, stores)
        write_texts(system.router, folder)
        made = describe(system, fusion, graphs, variants, folder)
        if request.gpus:
            made = build_engines(made, request.gpus, folder, stages)
        report: dict[str, Any] = {"family": request.family.name, "models": [model.name for model in system.models]}
        report |= {
            "parameters": {model.name: model.parameters for model in made.models},
            "max_seq_len": made.max_seq_len,
            "vocab_size": made.vocab_size,
        }
        compared, reason = measure(system, made, parts.held_out, folder, stages)
        report["variants"] = [
            summary(variant, folder)
            | {
                "compared": (found := compared.get((variant.target, variant.precision))),
                "missed": misses(variant.target, variant.precision, found),
            }
            | {"not_compared": None if found else obstacle(variant) or reason, "fitted": about}
            | {"engines": [engines(built, made) for built in variant.engines]}
            for variant, (_, about) in zip(made.variants, written, strict=True)
        ]
        report["not_compared"] = reason
        if request.strict:
            hold(report)
        report["stages"] = stages.report()
        write_report(folder, report)
        files = dict(made.files) | {"report.json": file_entry(folder / "report.json")}
        made.model_copy(update={"files": files}).write(folder)
    return report


def traces(system: System, stages: Stages, dialect: Dialect = ort) -> dict[str, Graph]:
    """One trace per distinct architecture in a dialect: model name → its graph."""
    keys = {model.name: architecture(model.config, system.vocab_size) for model in system.models}
    found: dict[str, Graph] = {}
    with stages.stage(f"tracing {len(set(keys.values()))} architecture(s)", len(set(keys.values()))) as advance:
        for model in system.models:
            if keys[model.name] not in found:
                found[keys[model.name]] = trace(system.family, model.config, system.vocab_size, system.max_seq_len, dialect)
                advance(1)
    return {name: found[key] for name, key in keys.items()}


def parameters(graph: Graph) -> int:
    """Number of checkpoint values that a graph reads (a tied embedding counts once)."""
    values = graph.model.graph.initializers
    return sum(int(np.prod(values[name].shape)) for name, source in graph.sources.items() if source.tensors)


def learn(
    system: System, graphs: dict[str, Graph], fusion: FusionSettings, source: str, parts: Parts, folder: Path, stages: Stages
) -> Table:
    """The calibration table of a system: the saved one that `source` names, or a new one. Raises InputError where it does not fit."""
    if source.endswith(".safetensors"):
        table = Table.load(Path(source))
        check(table, system, graphs)
        return table
    recording = folder / "recording"  # a bundle of its own that generates the texts
    try:
        stores = functools.cache(Store)
        stores(recording / GRAPHS)
        write_fusion_graph(recording / FUSION_GRAPH)
        large = sum(parameters(graph) for graph in graphs.values()) > LARGE
        scheme = RECORDED_LARGE if large else RECORDED
        variant, _ = write_variant(system, lambda _: graphs, "ort:cpu", scheme, {}, recording, stores, stages)
        write_texts(system.router, recording)
        describe(system, fusion, graphs, [variant], recording).write(recording)
        return calibrate(system, graphs, parts.calibration, recording, scheme.name, cache_folder(), stages)
    finally:
        shutil.rmtree(recording, ignore_errors=True)


def write_variant(
    system: System,
    traced: Callable[[Dialect], dict[str, Graph]],
    target: str,
    scheme: Scheme,
    known: dict[str, Evidence],
    folder: Path,
    stores: Callable[[Path], Store],
    stages: Stages,
    first: bool = True,
) -> tuple[manifest.Variant, dict[str, Any]]:
    """Write the graphs of all models in one precision, fitted to what is known of each model's activations (or of none).

    `traced` gives the traces in a dialect, by model; whatever the target, fitting reads those of `ort`. `stores` gives the store of a folder;
    `first` says that this is the target's first precision. Returns the variant and, by model, what fitting has to say for the report.
    """
    precision, chosen = scheme.name, TARGETS[target]
    graphs = traced(chosen.dialect)
    written: dict[str, str] = {}
    bits = 0.0
    total = sum(parameters(graph) for graph in graphs.values())
    shared: dict[Store, Shared] = {}
    about: dict[str, Any] = {}
    read: dict[str, int] = {}
    operators: set[str] = set()
    with stages.stage(f"writing {precision} for {target}", total) as advance:
        for model in system.models:
            graph, own = graphs[model.name], scheme
            name = chosen.place(model.name, target, precision, first)
            store = stores((folder / name).parent)
            try:
                if known and isinstance(scheme, Fitting):
                    common = shared.setdefault(store, Shared())
                    context = FitContext(traced(ort)[model.name], model.weights, known[model.name], store, common, advance)
                    fitted_graph, fitted = scheme.fit(context)
                    graph, own, about[model.name] = graph.with_sources_of(fitted_graph), fitted, fitted.about
            except InputError as error:
                raise InputError(f"{model.where} cannot be exported as {precision}: {error}") from error
            graph = graph.clone()
            chosen.prepare(graph, precision, system.family)
            head = system.head if model is system.router else None
            chosen.dialect.end_with(graph, head)
            try:
                bind(graph, model.weights, own, store, advance)
            except InputError as error:
                raise InputError(f"{model.where} cannot be exported as {precision}: {error}") from error
            if target in (ENGINES_OF, OLDER):
                operators |= {n.op_type for n in graph.model.graph}
            graph.model.graph.name = model.name
            read[model.name] = weight_bytes(graph.model)
            ir.save(graph.model, folder / name)
            chosen.complete((folder / name).parent, model, system.vocab_size, head)
            written[model.name] = name
            bits += own.bits * parameters(graphs[model.name]) / total
    found = manifest.Variant(
        target=target, precision=precision, graphs=written, fusion_graph=FUSION_GRAPH, bits_per_weight=round(bits, 4),
        weight_bytes=read, operators=sorted(operators),
    )  # fmt: skip
    return found, about


def write_texts(router: Checkpoint, folder: Path) -> None:
    """Copy tokenizer.json and the chat template, where the router has them."""
    if router.tokenizer is not None:
        shutil.copyfile(router.folder / "tokenizer.json", folder / "tokenizer.json")
    if router.chat_template is not None:
        (folder / "chat_template.jinja").write_text(router.chat_template, encoding="utf-8")


def describe(
    system: System, fusion: FusionSettings, graphs: dict[str, Graph], variants: Sequence[manifest.Variant], folder: Path
) -> manifest.Manifest:
    """The manifest of what stands in the folder so far."""
    router = system.router
    spelled = {index: token for token, index in (router.vocabulary or {}).items()}
    ends = router.end_tokens
    models = [
        manifest.Model(
            name=name,
            layers=graph.layers,
            kv_heads=graph.cache[0],
            head_size=graph.cache[1],
            parameters=parameters(graph),
        )
        for name, graph in graphs.items()
    ]
    return manifest.Manifest(
        format=1,
        family=system.family.name,
        models=models,
        **fusion.model_dump(),
        vocab_size=system.vocab_size,
        max_seq_len=system.max_seq_len,
        bos_token=spelled.get(router.config.bos_token_id),
        eos_token=spelled.get(ends[0]) if ends else None,
        eos_token_ids=ends,
        variants=list(variants),
        files={path.relative_to(folder).as_posix(): file_entry(path) for path in sorted(folder.rglob("*")) if path.is_file()},
    )


def build_engines(made: manifest.Manifest, gpus: tuple[int, ...], folder: Path, stages: Stages) -> manifest.Manifest:
    """Build TensorRT-RTX engines of every variant that has graphs for them; the manifest is written with them."""
    for variant in [each for each in made.variants if each.target == ENGINES_OF]:
        with stages.stage(f"building {variant.precision} engines", len(made.models) + 1) as advance:
            made = rebuild(folder, [variant], made, "rtx", gpus, None, lambda _: advance)
    return made


def file_entry(path: Path) -> manifest.File:
    """Size and hash; weights are named by their hash already."""
    digest = path.stem if path.parent.name == FOLDER else sha256(path)
    return manifest.File(sha256=digest, bytes=path.stat().st_size)


def measure(
    system: System,
    made: manifest.Manifest,
    prompts: list[str],
    folder: Path,
    stages: Stages,
) -> tuple[dict[tuple[str, str], dict[str, Any]], str | None]:
    """Compare every variant that this machine runs with torch: (target, precision) → figures, or nothing and the reason."""
    variants = [variant for variant in made.variants if obstacle(variant) is None]
    if not variants:
        return {}, None
    largest = max(model.parameters for model in made.models) * 4
    if largest > REFERENCE_LIMIT:
        return (
            {},
            f"a model takes {largest / 1e9:.1f} GB in fp32, more than the {REFERENCE_LIMIT / 1e9:.1f} GB that the comparison loads",
        )
    made.write(folder)  # the runtime that compares reads the bundle as users will
    texts = sequences(system, prompts)
    with stages.stage("reference in torch", len(system.models)) as advance:
        coefficients = FusionRuntime.coefficients(made.fusion, made.lam)
        references = reference(system, texts, coefficients, advance)
    found = {}
    for variant in variants:
        label = f"{variant.precision} for {variant.target}" if len({each.target for each in variants}) > 1 else variant.precision
        with stages.stage(f"comparing {label}", 2 * min(TOKENS, sum(map(len, texts)))) as advance:
            found[variant.target, variant.precision] = (
                compare(str(folder), variant.precision, texts, references, advance)
                if variant.target not in (ENGINES_OF, OLDER)
                else compare_scores(InPlaceSystem(folder, made, variant, coefficients).score, texts, references, advance)
            )
    return found, None


def obstacle(variant: manifest.Variant) -> str | None:
    """Why a variant cannot be run on this machine; graphs for TensorRT run on ONNX Runtime."""
    if variant.target in (CPU, ENGINES_OF, OLDER):
        return None
    if variant.target in ELSEWHERE:
        return f"graphs for {variant.target} are {ELSEWHERE[variant.target]}, which reads one model and does not route"
    return f"graphs for {variant.target} need a GPU, and this comparison runs on the CPU"


def hold(report: dict[str, Any]) -> None:
    """Raises FusionError where a precision misses its bound, or where one could not be measured."""
    if report["not_compared"]:
        raise FusionError(f"No precision could be compared with torch ({report['not_compared']}); export without --strict.")
    for entry in report["variants"]:
        if entry["not_compared"]:
            raise FusionError(
                f"The precision {entry['precision']} for {entry['target']} could not be compared with torch ({entry['not_compared']}); "
                "leave it out, or export without --strict."
            )
        if entry["missed"]:
            raise FusionError(
                f"The precision {entry['precision']} misses its bound ({'; '.join(entry['missed'])}); leave it out, or export without --strict."
            )


def summary(variant: manifest.Variant, folder: Path) -> dict[str, Any]:
    """Size of one variant: its graphs and every weight file they read, each once."""
    size = sum(path.stat().st_size for path in {*reads(variant, folder), *(folder / name for name in variant.graphs.values())})
    return {
        "target": variant.target,
        "precision": variant.precision,
        "bytes": size,
        "bits_per_weight": variant.bits_per_weight,
    }


def engines(built: manifest.Engines, made: manifest.Manifest) -> dict[str, Any]:
    """For the report."""
    return {
        "flavour": built.flavour,
        "version": built.version,
        "sms": built.sms,
        "bytes": {name: made.files[path].bytes for name, path in built.engines.items()},
    }


def reads(variant: manifest.Variant, folder: Path) -> set[Path]:
    """The weight files of a variant's graphs."""
    found = set()
    for name in variant.graphs.values():
        for value in ir.load(folder / name).graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                found.add((folder / name).parent / value.const_value.location)
    return found


def keep(files: set[Path], stores: Callable[[Path], Store]) -> None:
    """Remove from every store of `files` what is not among them."""
    for graphs in {file.parent.parent for file in files}:
        stores(graphs).keep({file.name for file in files if file.parent.parent == graphs})
