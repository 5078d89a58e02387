"""Write one graph for router and experts in one precision, and the experts' factors."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from fusionroute.fr_export.bundle.factor_file import write_factors
from fusionroute.fr_export.bundle.shared_base import Approximated, weight_count
from fusionroute.fr_export.bundle.targets import FUSION_GRAPH, GRAPHS, TARGETS, named, per_model
from fusionroute.fr_export.bundle.variant import VariantWriter, WrittenVariant
from fusionroute.fr_export.bundle.weight_traffic import weight_bytes
from fusionroute.fr_export.checkpoints.deltas import Delta
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.graphs.factor_arrays import FactorArrays, LowRank
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.passes import pair_segments
from fusionroute.fr_export.graphs.passes.pair_segments import Factors
from fusionroute.fr_export.graphs.traces import Traces
from fusionroute.fr_export.graphs.weight_files import WeightFiles
from fusionroute.fr_export.precision import Scheme
from fusionroute.fr_export.precision.approximation import approximate
from fusionroute.fr_export.precision.bind_weights import bind
from fusionroute.fr_export.precision.evidence import Evidence
from fusionroute.fr_export.precision.fit_model import fit_model
from fusionroute.fr_export.precision.products import coarse_products
from fusionroute.fr_export.precision.read_back import read_back
from fusionroute.fr_export.precision.shared_matrices import SharedMatrices
from fusionroute.runtime.errors import InputError
from fusionroute.runtime.manifest import File, Pair, Variant

BASE = "base"  # names the graph and its weights
FACTORS = "factors"  # the folder with the experts' files, beside the graphs


class PairVariantWriter:
    """Writes a system that shares one base into a bundle folder, variant by variant.

    The base is the router as it is: `deltas` are what experts add to it, of which some are `approximated`. Experts without
    a delta have graphs of their own. `evidence` as for `VariantWriter`.
    """

    def __init__(
        self, system: System, deltas: Mapping[str, Delta], approximated: Mapping[str, Approximated], traces: Traces,
        evidence: Mapping[str, Evidence], folder: Path, stages: Stages,
    ):  # fmt: skip
        self._system, self._deltas, self._approximated, self._traces, self._evidence = system, deltas, approximated, traces, evidence
        self._folder, self._graphs, self._stages = folder, folder / GRAPHS, stages
        self._sharing = [expert for expert in system.experts if expert.name in deltas]
        self._apart = [expert for expert in system.experts if expert.name not in deltas]
        self._whole = VariantWriter(system, traces, evidence, folder, stages, self._apart)
        self._store = self._whole.store(self._graphs)
        self._factor_files: dict[str, File] = {}  # by their paths in the bundle

    def write(self, target: str, scheme: Scheme) -> WrittenVariant:
        """Write the graph for a target in the precision of `scheme`, and the factors.

        Raises InputError where weights do not fit the precision, FusionError where the router cannot be traced.
        """
        system, spec, router = self._system, TARGETS[target], self._system.router
        path = named(BASE, target, scheme.name, False)
        total = self._traces.of(spec.dialect)[router.name].parameters
        with self._stages.stage(f"writing {scheme.name} for {target}, one base", total) as advance, coarse_products():
            try:
                graph, own, about = fit_model(
                    router, spec.dialect, scheme, self._traces, self._evidence, self._store, SharedMatrices(), advance
                )
                spec.prepare(graph, scheme.name, router.family)
                spec.dialect.end_with(graph, system.head)
                factors, vectors = self._pair(graph)
                bind(graph, router.weights, own, self._store, advance)
            except InputError as error:
                raise InputError(f"{router.where} cannot be exported as {scheme.name}: {error}") from error
            graph.model.graph.name = BASE
            ir.save(graph.model, self._folder / path)
        arrays = {
            expert.name: FactorArrays(
                graph, factors, vectors, self._deltas[expert.name], expert.weights, self._approximate(expert.name, graph, scheme.name)
            )
            for expert in self._sharing
        }
        files = {name: self._write_factors(name, own_arrays) for name, own_arrays in arrays.items()}
        whole, fitted = self._whole.write(target, scheme) if self._apart else (None, {})
        variant = Variant(
            target=target,
            precision=scheme.name,
            graphs=whole.graphs if whole else {},
            fusion_graph=FUSION_GRAPH,
            bits_per_weight=round(own.bits, 4),
            weight_bytes={
                router.name: weight_bytes(graph.model),
                **{name: each.bytes_read for name, each in arrays.items()},
                **(whole.weight_bytes if whole else {}),
            },
            pair=Pair(graph=path, factors=files),
        )
        return WrittenVariant(variant, ({} if about is None else {router.name: about}) | fitted)

    def _approximate(self, expert: str, graph: Graph, precision: str) -> dict[str, LowRank]:
        """The factors that bring the base, as the graph reads it, to an expert whose matrices have become others."""
        if expert not in self._approximated:
            return {}
        changed, ranks = self._approximated[expert]

        def base(matrix: str) -> np.ndarray:
            return read_back(graph, matrix, self._system.router.weights)

        with self._stages.stage(f"approximating {expert} on the {precision} base", weight_count(changed.graph)) as advance:
            return approximate(changed, base, ranks.of, advance)

    def _pair(self, graph: Graph) -> tuple[list[Factors], list[str]]:
        """Let the router's graph read pairs. Returns the inputs for factors, and the vectors that experts have."""
        terms = {name for delta in self._deltas.values() for name in (*delta.terms, *delta.matrices)}
        others = {name for delta in self._deltas.values() for name in delta.vectors}
        matrices = [name for name, source in graph.sources.items() if terms.intersection(source.tensors)]
        vectors = [name for name, source in graph.sources.items() if others.intersection(source.tensors)]
        return pair_segments(graph, matrices, vectors), vectors

    def _write_factors(self, expert: str, arrays: FactorArrays) -> str:
        """Write an expert's factors, once where precisions agree on them. Returns the path in the bundle."""
        path, entry = write_factors(self._graphs / FACTORS, expert, arrays.shapes, arrays.arrays())
        name = path.relative_to(self._folder).as_posix()
        self._factor_files[name] = entry
        return name

    def gather_weights(self, variants: Sequence[Variant]) -> dict[str, File]:
        """Gather the base's weights in one file, those of each expert apart in another, and remove what no graph reads.

        Returns what the manifest says of it and of the factors, by their paths in the bundle.
        """
        with self._stages.stage("gathering the weights"):
            files, graphs = WeightFiles(self._store), {BASE: [each.pair.graph for each in variants if each.pair]}
            graphs |= {expert.name: [each.graphs[expert.name] for each in variants] for expert in self._apart}
            planned = {per_model(name): files.plan(per_model(name), [self._folder / path for path in own]) for name, own in graphs.items()}
            entries = {f"{GRAPHS}/{location}": file.write() for location, file in planned.items()}
            files.remove_unread()
        return self._factor_files | {name: entry for name, entry in entries.items() if entry is not None}
