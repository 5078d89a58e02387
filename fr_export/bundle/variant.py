"""Write the graphs of all models in one precision for one target."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import onnx_ir as ir

from fusionroute.fr_export.bundle.targets import FUSION_GRAPH, TARGETS
from fusionroute.fr_export.bundle.weight_traffic import weight_bytes
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.graphs.traces import Traces
from fusionroute.fr_export.graphs.weight_files import WeightFiles
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision import Scheme
from fusionroute.fr_export.precision.bind_weights import bind
from fusionroute.fr_export.precision.evidence import Evidence
from fusionroute.fr_export.precision.fit_context import SharedMatrices
from fusionroute.fr_export.precision.fit_model import fit_model
from fusionroute.runtime.errors import InputError
from fusionroute.runtime.manifest import File, Variant
from fusionroute.runtime.tensorrt.library import OLDER
from fusionroute.runtime.tensorrt.library import TARGET as TENSORRT


class WrittenVariant(NamedTuple):
    """A variant as the manifest lists it, and what fitting reports of each model: model name → plain data."""

    variant: Variant
    fitted: dict[str, Any]


class VariantWriter:
    """Writes a system's graphs into one bundle folder, variant by variant. Equal weights are stored once.

    `evidence` holds what calibration learnt of each model's activations; without it weights are rounded to nearest.
    """

    def __init__(self, system: System, traces: Traces, evidence: Mapping[str, Evidence], folder: Path, stages: Stages):
        self._system, self._traces, self._evidence, self._folder, self._stages = system, traces, evidence, folder, stages
        self._stores: dict[Path, Store] = {}  # by the folder whose graphs read them
        self._started: set[str] = set()  # targets that have a variant already

    def write(self, target: str, scheme: Scheme) -> WrittenVariant:
        """Write every model for a target in the precision of `scheme`.

        Raises InputError where a model's weights do not fit the precision, FusionError where a model cannot be traced.
        """
        system, spec = self._system, TARGETS[target]
        first = target not in self._started
        self._started.add(target)
        traces = self._traces.of(spec.dialect)
        total = sum(trace.parameters for trace in traces.values())
        shared: dict[Store, SharedMatrices] = {}  # what the models of one store have in common
        paths: dict[str, str] = {}
        fitted: dict[str, Any] = {}
        token_bytes: dict[str, int] = {}
        operators: set[str] = set()
        bits = 0.0
        with self._stages.stage(f"writing {scheme.name} for {target}", total) as advance:
            for model in system.models:
                paths[model.name] = spec.place(model.name, target, scheme.name, first)
                file = self._folder / paths[model.name]
                store = self._store(file.parent)
                head = system.head if model is system.router else None
                try:
                    common = shared.setdefault(store, SharedMatrices())
                    graph, own, about = fit_model(model, spec.dialect, scheme, self._traces, self._evidence, store, common, advance)
                    spec.prepare(graph, scheme.name, model.family)
                    spec.dialect.end_with(graph, head)
                    bind(graph, model.weights, own, store, advance)
                except InputError as error:
                    raise InputError(f"{model.where} cannot be exported as {scheme.name}: {error}") from error
                if about is not None:
                    fitted[model.name] = about
                graph.model.graph.name = model.name
                token_bytes[model.name] = weight_bytes(graph.model)
                operators |= {node.op_type for node in graph.model.graph}
                ir.save(graph.model, file)
                spec.complete(file.parent, model, system.vocab_size, head)
                bits += own.bits * traces[model.name].parameters / total
        variant = Variant(
            target=target,
            precision=scheme.name,
            graphs=paths,
            fusion_graph=FUSION_GRAPH,
            bits_per_weight=round(bits, 4),
            weight_bytes=token_bytes,
            operators=sorted(operators) if target in (TENSORRT, OLDER) else [],
        )
        return WrittenVariant(variant, fitted)

    def gather_weights(self, variants: Sequence[Variant]) -> dict[str, File]:
        """Gather the weights of all graphs in one file per model and folder, and remove what no graph reads.

        Returns what the manifest says of these files, by their paths in the bundle.
        """
        readers: dict[tuple[Path, str], list[Path]] = {}
        for model in self._system.models:
            for variant in variants:
                graph = self._folder / variant.graphs[model.name]
                readers.setdefault((graph.parent, TARGETS[variant.target].weights(model.name)), []).append(graph)
        entries: dict[str, File] = {}
        with self._stages.stage("gathering the weights"):
            files = {folder: WeightFiles(store) for folder, store in self._stores.items()}
            for (folder, location), graphs in readers.items():
                if (entry := files[folder].write(location, graphs)) is not None:
                    entries[(folder / location).relative_to(self._folder).as_posix()] = entry
            for each in files.values():
                each.remove_unread()
        return entries

    def _store(self, graphs: Path) -> Store:
        if graphs not in self._stores:
            self._stores[graphs] = Store(graphs)
        return self._stores[graphs]


def stored_weights(variant: Variant, folder: Path) -> dict[tuple[Path, int], int]:
    """What a variant's graphs read, each tensor once: its file and offset → bytes."""
    lengths: dict[tuple[Path, int], int] = {}
    for name in variant.graph_paths:
        for value in ir.load(folder / name).graph.initializers.values():
            if isinstance(tensor := value.const_value, ir.ExternalTensor):
                lengths[(folder / name).parent / tensor.location, tensor.offset or 0] = tensor.length or tensor.nbytes
    return lengths
