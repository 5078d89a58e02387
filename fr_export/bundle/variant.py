"""Write the graphs of all models in one precision for one target."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import onnx_ir as ir

from fusionroute.fr_export.bundle.targets import FUSION_GRAPH, TARGETS
from fusionroute.fr_export.bundle.weight_traffic import weight_bytes
from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.checkpoints.weights import Weights
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.graphs.decoder_blocks import matrices
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.passes import quantise_caches, window_inputs
from fusionroute.fr_export.graphs.source_rows import digest, unscaled
from fusionroute.fr_export.graphs.traces import Traces
from fusionroute.fr_export.graphs.weight_files import WeightFile, WeightFiles
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision import Scheme
from fusionroute.fr_export.precision.bind_weights import bind
from fusionroute.fr_export.precision.concurrency import Concurrency, memory_of
from fusionroute.fr_export.precision.evidence import Evidence
from fusionroute.fr_export.precision.fit_model import fit_model
from fusionroute.fr_export.precision.kept_matrices import KeptMatrices
from fusionroute.fr_export.precision.kv_scales import kv_scales
from fusionroute.fr_export.precision.products import coarse_products
from fusionroute.fr_export.precision.scheme import Fitting
from fusionroute.fr_export.precision.shared_matrices import SharedMatrices
from fusionroute.runtime.backends.ort_cpu import TARGET as CPU
from fusionroute.runtime.errors import InputError
from fusionroute.runtime.file_entry import File
from fusionroute.runtime.kv_precisions import KV_PRECISIONS, KvName
from fusionroute.runtime.machine import cores
from fusionroute.runtime.manifest import Variant
from fusionroute.runtime.tensorrt.library import OLDER
from fusionroute.runtime.tensorrt.library import TARGET as TENSORRT
from fusionroute.runtime.window import Window


class WrittenVariant(NamedTuple):
    """A variant as the manifest lists it, and what fitting reports of each model: model name → plain data."""

    variant: Variant
    fitted: dict[str, Any]


class WrittenModel(NamedTuple):
    """What fitting reports of a model, its bits in all, the bytes that a token reads of it, its operators, and its window."""

    about: dict[str, Any] | None
    bits: float
    bytes: int
    operators: set[str]
    window: Window | None


class VariantWriter:
    """Writes graphs of a system's models into one bundle folder, variant by variant. Equal weights are stored once.

    `evidence` holds what calibration learnt of each model's activations; without it weights are rounded to nearest.
    `models`: those that are written; None: all. `kept`: what exports that were ended have rounded already. `kv`: the
    precision of keys and values; None: that of the activations. `windows`: see `window_inputs`.
    """

    def __init__(
        self, system: System, traces: Traces, evidence: Mapping[str, Evidence], folder: Path, stages: Stages,
        models: Sequence[Checkpoint] | None = None, kept: KeptMatrices | None = None, kv: KvName | None = None, windows: bool = True,
    ):  # fmt: skip
        self._kept, self._kv, self._windows = kept, kv, windows
        self._system, self._traces, self._evidence, self._folder, self._stages = system, traces, evidence, folder, stages
        self._models = system.models if models is None else models
        self._stores: dict[Path, Store] = {}  # by the folder whose graphs read them
        self._started: set[str] = set()  # targets that have a variant already

    def write(self, target: str, scheme: Scheme) -> WrittenVariant:
        """Write every model for a target in the precision of `scheme`.

        Raises InputError where a model's weights do not fit the precision, FusionError where a model cannot be traced.
        """
        system, spec = self._system, TARGETS[target]
        first = target not in self._started
        self._started.add(target)
        every = self._traces.of(spec.dialect)
        traces = {model.name: every[model.name] for model in self._models}
        fitted_on = self._traces.of() if isinstance(scheme, Fitting) and self._evidence else {}
        concurrency = Concurrency.of(len(self._models), max(map(memory_of, (fitted_on or traces).values())))
        paths = {model.name: spec.place(model.name, target, scheme.name, first) for model in self._models}
        stores = {name: self.store((self._folder / path).parent) for name, path in paths.items()}

        def write(model: Checkpoint, advance: Callable[[float], None]) -> WrittenModel:
            file, store, trace = self._folder / paths[model.name], stores[model.name], traces[model.name]
            head = system.head if model is system.router else None
            try:
                graph, own, about = fit_model(
                    model, spec.dialect, scheme, self._traces, self._evidence, store, shared[store], advance,
                    number=self._models.index(model), threads=concurrency.threads, kept=self._kept, note=self._stages.note,
                )  # fmt: skip
                spec.prepare(graph, scheme.name, model.family)
                store_caches(graph, self._kv, self._evidence.get(model.name))
                window = window_inputs(graph, system.max_seq_len) if self._windows and target == CPU else None
                spec.dialect.end_with(graph, head)
                bind(graph, model.weights, own, store, advance)
            except InputError as error:
                raise InputError(f"{model.where} cannot be exported as {scheme.name}: {error}") from error
            graph.model.graph.name = model.name
            ir.save(graph.model, file)
            spec.complete(file.parent, model, system.vocab_size, head)
            operators = {node.op_type for node in graph.model.graph}
            return WrittenModel(about, own.bits * trace.parameters, weight_bytes(graph.model), operators, window)

        total = sum(trace.parameters for trace in traces.values())
        with self._stages.stage(f"writing {scheme.name} for {target}", total) as advance, coarse_products():
            shared = self._shared(stores, fitted_on, concurrency)
            written = dict(zip(paths, concurrency.each(write, self._models, advance), strict=True))
        variant = Variant(
            target=target,
            precision=scheme.name,
            graphs=paths,
            fusion_graph=FUSION_GRAPH,
            bits_per_weight=round(sum(model.bits for model in written.values()) / total, 4),
            weight_bytes={name: model.bytes for name, model in written.items()},
            operators=sorted(set().union(*(model.operators for model in written.values()))) if target in (TENSORRT, OLDER) else [],
            kv=stored_as(self._kv),
            windows={name: model.window for name, model in written.items() if model.window is not None},
        )
        return WrittenVariant(variant, {name: model.about for name, model in written.items() if model.about is not None})

    def _shared(self, stores: Mapping[str, Store], graphs: Mapping[str, Graph], concurrency: Concurrency) -> dict[Store, SharedMatrices]:
        """What the models of each store have in common. Several at a time need to know it before they begin."""
        models = self._models
        contents: list[set[str]] = []
        if graphs and concurrency.models > 1:
            contents = concurrency.each(lambda model, _: matrix_digests(graphs[model.name], model.weights), models, lambda _: None)

        def of(store: Store) -> list[set[str]]:
            return [own if stores[model.name] is store else set() for model, own in zip(models, contents, strict=True)] if contents else []

        return {store: SharedMatrices(of(store)) for store in stores.values()}

    def gather_weights(self, variants: Sequence[Variant]) -> dict[str, File]:
        """Gather the weights of all graphs in one file per model and folder, and remove what no graph reads.

        Returns what the manifest says of these files, by their paths in the bundle.
        """
        readers: dict[tuple[Path, str], list[Path]] = {}
        for model in self._models:
            for variant in variants:
                graph = self._folder / variant.graphs[model.name]
                readers.setdefault((graph.parent, TARGETS[variant.target].weights(model.name)), []).append(graph)
        with self._stages.stage("gathering the weights"), ThreadPoolExecutor(cores()) as pool:
            files_of = {folder: WeightFiles(store) for folder, store in self._stores.items()}
            files = {folder / location: files_of[folder].plan(location, graphs) for (folder, location), graphs in readers.items()}
            entries = dict(zip(files, pool.map(WeightFile.write, files.values()), strict=True))
            for each in files_of.values():
                each.remove_unread()
        return {path.relative_to(self._folder).as_posix(): entry for path, entry in entries.items() if entry is not None}

    def store(self, graphs: Path) -> Store:
        """The one for graphs in a folder."""
        if graphs not in self._stores:
            self._stores[graphs] = Store(graphs)
        return self._stores[graphs]


def stored_as(kv: KvName | None) -> KvName | None:
    """What the manifest says of the precision of keys and values: nothing where it is that of the activations."""
    return kv if kv is not None and KV_PRECISIONS[kv].quantised else None


def store_caches(graph: Graph, kv: KvName | None, known: Evidence | None) -> None:
    """Let a graph store keys and values in a precision. Raises InputError where calibration has not seen them."""
    if kv is not None and KV_PRECISIONS[kv].quantised:
        bits = KV_PRECISIONS[kv].bits
        quantise_caches(graph, kv_scales(graph, {} if known is None else known.observed, bits), bits)


def matrix_digests(graph: Graph, weights: Weights) -> set[str]:
    """The contents of a model's matrices."""
    return {digest(unscaled(graph.sources[name]), weights) for name in matrices(graph)}


def stored_weights(variant: Variant, folder: Path) -> dict[tuple[Path, int], int]:
    """What a variant's graphs read, each tensor once: its file and offset → bytes."""
    lengths: dict[tuple[Path, int], int] = {}
    for name in variant.graph_paths:
        for value in ir.load(folder / name).graph.initializers.values():
            if isinstance(tensor := value.const_value, ir.ExternalTensor):
                lengths[(folder / name).parent / tensor.location, tensor.offset or 0] = tensor.length or tensor.nbytes
    return lengths
