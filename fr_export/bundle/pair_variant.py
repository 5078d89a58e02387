"""Write one graph for router and experts in one precision, and the experts' factors."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from fusionroute.fr_export.bundle.factor_file import write_factors
from fusionroute.fr_export.bundle.targets import FUSION_GRAPH, GRAPHS, TARGETS, Apart, named, per_model
from fusionroute.fr_export.bundle.variant import WrittenVariant
from fusionroute.fr_export.bundle.weight_traffic import weight_bytes
from fusionroute.fr_export.checkpoints.deltas import Delta
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.graphs.factor_arrays import FactorArrays, matrix_rank
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.traces import Traces
from fusionroute.fr_export.graphs.weight_files import WeightFiles
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision import Scheme
from fusionroute.fr_export.precision.bind_weights import bind
from fusionroute.fr_export.precision.evidence import Evidence
from fusionroute.fr_export.precision.fit_model import fit_model
from fusionroute.fr_export.precision.products import coarse_products
from fusionroute.fr_export.precision.shared_matrices import SharedMatrices
from fusionroute.runtime.errors import InputError
from fusionroute.runtime.manifest import BASE, File, Pair, Variant
from fusionroute.runtime.tensorrt.library import OLDER
from fusionroute.runtime.tensorrt.library import TARGET as TENSORRT

FACTORS = "factors"  # the folder with the experts' files, beside the graphs


class PairVariantWriter:
    """Writes a system that shares one base into a bundle folder, variant by variant.

    The base is the router as it is: `deltas` are what experts add to it. `evidence` as for `VariantWriter`.
    """

    def __init__(
        self, system: System, deltas: Mapping[str, Delta], traces: Traces, evidence: Mapping[str, Evidence], folder: Path, stages: Stages
    ):
        self._system, self._deltas, self._traces, self._evidence = system, deltas, traces, evidence
        self._folder, self._graphs, self._stages = folder, folder / GRAPHS, stages
        self._store = Store(self._graphs)
        self._factor_files: dict[str, File] = {}  # by their paths in the bundle

    def write(self, target: str, scheme: Scheme) -> WrittenVariant:
        """Write the graph for a target in the precision of `scheme`, and the factors.

        Raises InputError where weights do not fit the precision, FusionError where the router cannot be traced.
        """
        system, spec, router = self._system, TARGETS[target], self._system.router
        assert spec.pair is not None, "the command line refuses other targets"
        dialect = spec.pair.dialect
        path = named(BASE, target, scheme.name, False)
        total = self._traces.of(dialect)[router.name].parameters
        with self._stages.stage(f"writing {scheme.name} for {target}, one base", total) as advance, coarse_products():
            try:
                graph, own, about = fit_model(router, dialect, scheme, self._traces, self._evidence, self._store, SharedMatrices(), advance)
                spec.prepare(graph, scheme.name, router.family)
                dialect.end_with(graph, system.head)
                factors = self._set_apart(graph, spec.pair.apart)
                bind(graph, router.weights, own, self._store, advance)
            except InputError as error:
                raise InputError(f"{router.where} cannot be exported as {scheme.name}: {error}") from error
            graph.model.graph.name = BASE
            ir.save(graph.model, self._folder / path)
            files = {name: self._write_factors(name, arrays) for name, arrays in factors.items()}
        variant = Variant(
            target=target,
            precision=scheme.name,
            graphs={},
            fusion_graph=FUSION_GRAPH,
            bits_per_weight=round(own.bits, 4),
            weight_bytes={router.name: weight_bytes(graph.model)} | {name: arrays.bytes for name, arrays in factors.items()},
            operators=sorted({node.op_type for node in graph.model.graph}) if target in (TENSORRT, OLDER) else [],
            pair=Pair(graph=path, factors=files),
        )
        return WrittenVariant(variant, {} if about is None else {router.name: about})

    def _set_apart(self, graph: Graph, apart: Apart) -> dict[str, FactorArrays]:
        """Let the graph take what experts add to the router. Returns what its inputs hold for each expert."""
        terms = {name for delta in self._deltas.values() for name in delta.terms}
        others = {name for delta in self._deltas.values() for name in delta.vectors}
        ranks = {
            name: max(matrix_rank(source, delta) for delta in self._deltas.values())
            for name, source in graph.sources.items()
            if terms.intersection(source.tensors)
        }
        vectors = [name for name, source in graph.sources.items() if others.intersection(source.tensors)]
        factors = apart(graph, ranks, vectors)
        return {each.name: FactorArrays(graph, factors, vectors, self._deltas[each.name], each.weights) for each in self._system.experts}

    def _write_factors(self, expert: str, arrays: FactorArrays) -> str:
        """Write an expert's factors, once where precisions agree on them. Returns the path in the bundle."""
        path, entry = write_factors(self._graphs / FACTORS, expert, arrays.shapes, arrays.types, arrays.arrays())
        name = path.relative_to(self._folder).as_posix()
        self._factor_files[name] = entry
        return name

    def gather_weights(self, variants: Sequence[Variant]) -> dict[str, File]:
        """Gather the base's weights in one file, and remove what no graph reads.

        Returns what the manifest says of it and of the factors, by their paths in the bundle.
        """
        with self._stages.stage("gathering the weights"):
            files, location = WeightFiles(self._store), per_model(BASE)
            base = files.plan(location, [self._folder / path for variant in variants for path in variant.graph_paths]).write()
            files.remove_unread()
        return self._factor_files | ({} if base is None else {f"{GRAPHS}/{location}": base})
