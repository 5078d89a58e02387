"""Write one graph for router and experts in one precision, and the experts' factors."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from fusionroute.fr_export.bundle.factor_file import write_factors
from fusionroute.fr_export.bundle.targets import FUSION_GRAPH, TARGETS
from fusionroute.fr_export.bundle.variant import WrittenVariant
from fusionroute.fr_export.bundle.weight_traffic import weight_bytes
from fusionroute.fr_export.checkpoints.deltas import Delta
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.graphs.factor_arrays import FactorArrays
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.passes import pair_segments
from fusionroute.fr_export.graphs.traces import Traces
from fusionroute.fr_export.graphs.weight_files import WeightFiles
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision import Scheme
from fusionroute.fr_export.precision.bind_weights import bind
from fusionroute.fr_export.precision.evidence import Evidence
from fusionroute.fr_export.precision.fit_context import SharedMatrices
from fusionroute.fr_export.precision.fit_model import fit_model
from fusionroute.runtime.errors import InputError
from fusionroute.runtime.manifest import File, Pair, Variant

BASE, FACTORS = "base", "factors"  # of the one graph, and the folder beside its weights


class PairVariantWriter:
    """Writes a system that shares one base into a bundle folder, variant by variant.

    The base is the router as it is: `deltas` are what experts add to it. `evidence` as for `VariantWriter`.
    """

    def __init__(
        self, system: System, deltas: Mapping[str, Delta], traces: Traces, evidence: Mapping[str, Evidence], folder: Path, stages: Stages
    ):
        self._system, self._deltas, self._traces, self._evidence = system, deltas, traces, evidence
        self._folder, self._stages = folder, stages
        self._stores: dict[Path, Store] = {}
        self._factor_files: dict[str, File] = {}

    def write(self, target: str, scheme: Scheme) -> WrittenVariant:
        """Write the graph for a target in the precision of `scheme`, and the factors.

        Raises InputError where weights do not fit the precision, FusionError where the router cannot be traced.
        """
        system, spec, router = self._system, TARGETS[target], self._system.router
        trace = self._traces.of(spec.dialect)[router.name]
        path = spec.place(BASE, target, scheme.name, not self._stores)
        file = self._folder / path
        store = self._stores.setdefault(file.parent, Store(file.parent))
        with self._stages.stage(f"writing {scheme.name} for {target}, one graph", trace.parameters) as advance:
            try:
                graph, own, about = fit_model(router, spec.dialect, scheme, self._traces, self._evidence, store, SharedMatrices(), advance)
                spec.prepare(graph, scheme.name, router.family)
                spec.dialect.end_with(graph, system.head)
                arrays = self._pair(graph)
                factors = {name: self._write_factors(name, each, file.parent) for name, each in arrays.items()}
                bind(graph, router.weights, own, store, advance)
            except InputError as error:
                raise InputError(f"{router.where} cannot be exported as {scheme.name}: {error}") from error
            graph.model.graph.name = BASE
            token_bytes = {router.name: weight_bytes(graph.model)} | {
                name: self._factor_files[each].bytes for name, each in factors.items()
            }
            ir.save(graph.model, file)
        variant = Variant(
            target=target,
            precision=scheme.name,
            graphs={},
            fusion_graph=FUSION_GRAPH,
            bits_per_weight=round(own.bits, 4),
            weight_bytes=token_bytes,
            pair=Pair(graph=path, factors=factors),
        )
        return WrittenVariant(variant, {} if about is None else {router.name: about})

    def _pair(self, graph: Graph) -> dict[str, FactorArrays]:
        """Let a router's graph read pairs. Returns what its inputs hold for each expert, which nothing has read yet."""
        terms = {name for delta in self._deltas.values() for name in delta.terms}
        others = {name for delta in self._deltas.values() for name in delta.vectors}
        matrices = [name for name, source in graph.sources.items() if terms.intersection(source.tensors)]
        vectors = [name for name, source in graph.sources.items() if others.intersection(source.tensors)]
        before = graph.clone()  # with the shapes of the matrices, which vanish when they are bound
        factors = pair_segments(graph, matrices, vectors)
        return {
            expert.name: FactorArrays(before, factors, vectors, self._deltas[expert.name], expert.weights)
            for expert in self._system.experts
        }

    def _write_factors(self, expert: str, arrays: FactorArrays, graphs: Path) -> str:
        """Write an expert's factors, once where precisions agree on them. Returns the path in the bundle."""
        path, entry = write_factors(graphs / FACTORS, expert, arrays.shapes, arrays.arrays())
        name = path.relative_to(self._folder).as_posix()
        self._factor_files[name] = entry
        return name

    def gather_weights(self, variants: Sequence[Variant]) -> dict[str, File]:
        """Gather the base's weights in one file per folder, and remove what no graph reads.

        Returns what the manifest says of the files with weights, by their paths in the bundle.
        """
        entries = dict(self._factor_files)
        with self._stages.stage("gathering the weights"):
            for folder, store in self._stores.items():
                graphs = [
                    self._folder / each.pair.graph for each in variants if each.pair and (self._folder / each.pair.graph).parent == folder
                ]
                files = WeightFiles(store)
                location = TARGETS[variants[0].target].weights(BASE)
                if (entry := files.write(location, graphs)) is not None:
                    entries[(folder / location).relative_to(self._folder).as_posix()] = entry
                files.remove_unread()
        return entries
