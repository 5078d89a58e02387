"""Write one graph for router and experts in one precision, and the experts' factors."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from fusionroute.fr_export.bundle.adapting import write_layout, write_unadapted
from fusionroute.fr_export.bundle.shared_base import Approximated, unadapted, weight_count
from fusionroute.fr_export.bundle.targets import FUSION_GRAPH, GRAPHS, TARGETS, Pairing, named, per_model
from fusionroute.fr_export.bundle.variant import VariantWriter, WrittenVariant, store_caches, stored_as
from fusionroute.fr_export.bundle.weight_traffic import weight_bytes
from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.checkpoints.deltas import Delta
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.graphs.factor_arrays import FactorArrays, LowRank, layout_of, matrix_rank
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.passes import is_linear, segment_per_expert, shares_head, split_head
from fusionroute.fr_export.graphs.traces import Traces
from fusionroute.fr_export.graphs.weight_files import WeightFiles
from fusionroute.fr_export.precision import Scheme
from fusionroute.fr_export.precision.approximation import approximate
from fusionroute.fr_export.precision.bind_weights import bind
from fusionroute.fr_export.precision.evidence import Evidence, pooled
from fusionroute.fr_export.precision.fit_model import fit_model
from fusionroute.fr_export.precision.kept_matrices import KeptMatrices
from fusionroute.fr_export.precision.products import coarse_products
from fusionroute.fr_export.precision.read_back import read_back
from fusionroute.fr_export.precision.shared_matrices import SharedMatrices
from fusionroute.runtime.adapters.factor_file import write_factors
from fusionroute.runtime.adapters.factor_layout import FactorLayout
from fusionroute.runtime.bundle import FACTORS
from fusionroute.runtime.errors import InputError
from fusionroute.runtime.file_entry import File
from fusionroute.runtime.kv_precisions import KvName
from fusionroute.runtime.manifest import BASE, Adapting, Pair, Variant
from fusionroute.runtime.tensor_file import Written
from fusionroute.runtime.tensorrt.library import OLDER
from fusionroute.runtime.tensorrt.library import TARGET as TENSORRT

HEAD = "head"  # names a graph that reads the base's weights too
ADAPTING = "adapting"  # the folder with what it takes to add experts, beside the graphs


class PairVariantWriter:
    """Writes a system that shares one base into a bundle folder, variant by variant.

    The base is the router as it is: `deltas` are what experts add to it, of which some are `approximated`. Experts without
    a delta have graphs of their own. `evidence`, `kept` and `kv` as for `VariantWriter`; the steps of keys and values are
    those of all models that share the base.
    """

    def __init__(
        self, system: System, deltas: Mapping[str, Delta], approximated: Mapping[str, Approximated], traces: Traces,
        evidence: Mapping[str, Evidence], folder: Path, stages: Stages, kept: KeptMatrices | None = None, kv: KvName | None = None,
    ):  # fmt: skip
        self._kept, self._kv = kept, kv
        self._system, self._deltas, self._approximated, self._traces = system, deltas, approximated, traces
        self._folder, self._graphs, self._stages = folder, folder / GRAPHS, stages
        self._sharing = [expert for expert in system.experts if expert.name in deltas]
        self._apart = [expert for expert in system.experts if expert.name not in deltas]
        self._evidence = base_evidence(system.router, self._sharing, evidence)
        self._whole = VariantWriter(system, traces, evidence, folder, stages, self._apart, kept, kv)
        self._store = self._whole.store(self._graphs)
        self._factor_files: dict[str, File] = {}  # by their paths in the bundle

    def write(self, target: str, scheme: Scheme) -> WrittenVariant:
        """Write the graph for a target in the precision of `scheme`, and the factors.

        Raises InputError where weights do not fit the precision, FusionError where the router cannot be traced.
        """
        system, spec, router = self._system, TARGETS[target], self._system.router
        assert spec.pair is not None, "the command line refuses other targets"
        dialect = spec.pair.dialect
        path, head_path = (named(name, target, scheme.name, False) for name in (BASE, HEAD))
        total = self._traces.of(dialect)[router.name].parameters
        with self._stages.stage(f"writing {scheme.name} for {target}, one base", total) as advance, coarse_products():
            try:
                graph, own, about = fit_model(
                    router, dialect, scheme, self._traces, self._evidence, self._store, SharedMatrices(), advance,
                    kept=self._kept, note=self._stages.note,
                )  # fmt: skip
                spec.prepare(graph, scheme.name, router.family)
                store_caches(graph, self._kv, self._evidence.get(router.name))
                dialect.end_with(graph, system.head)
                layout, inputs = self._set_apart(graph, spec.pair)
                bind(graph, router.weights, own, self._store, advance)
            except InputError as error:
                raise InputError(f"{router.where} cannot be exported as {scheme.name}: {error}") from error
            head = split_head(graph.model) if spec.pair.splits_head and shares_head(graph.model) else None
            every_expert = spec.pair.every_expert and self._every_expert(layout, head)
            if every_expert:
                segment_per_expert(graph.model, len(self._sharing))
            graph.model.graph.name = BASE
            ir.save(graph.model, self._folder / path)
            if head is not None:
                ir.save(head, self._folder / head_path)
        arrays = {expert.name: self._arrays(expert, graph, layout, inputs, scheme.name) for expert in self._sharing}
        files = {name: self._write_factors(name, own_arrays) for name, own_arrays in arrays.items()}
        whole, fitted = self._whole.write(target, scheme) if self._apart else (None, {})
        variant = Variant(
            target=target,
            precision=scheme.name,
            graphs=whole.graphs if whole else {},
            fusion_graph=FUSION_GRAPH,
            bits_per_weight=round(own.bits, 4),
            weight_bytes={
                router.name: sum(map(weight_bytes, [graph.model, *([head] if head else [])])),
                **{name: each.bytes_read for name, each in arrays.items()},
                **(whole.weight_bytes if whole else {}),
            },
            operators=sorted({node.op_type for node in graph.model.graph}) if target in (TENSORRT, OLDER) else [],
            pair=Pair(
                graph=path,
                every_expert=every_expert,
                head=head_path if head else None,
                head_is_linear=head is not None and is_linear(head),
                factors=files,
                adapting=None if self._apart else self._write_adapting(layout),
            ),
            kv=stored_as(self._kv),
            windows=whole.windows if whole else {},
        )
        return WrittenVariant(variant, ({} if about is None else {router.name: about}) | fitted)

    def _arrays(self, expert: Checkpoint, graph: Graph, layout: FactorLayout, inputs: Mapping[str, str], precision: str) -> FactorArrays:
        """What the graph's inputs hold for an expert."""
        approximated = {inputs[name]: each for name, each in self._approximate(expert.name, graph, precision).items()}
        return FactorArrays(layout, self._deltas[expert.name], expert.weights, approximated)

    def _approximate(self, expert: str, graph: Graph, precision: str) -> dict[str, LowRank]:
        """The factors that bring the base, as the graph reads it, to an expert whose matrices have become others."""
        if expert not in self._approximated:
            return {}
        changed, ranks = self._approximated[expert]

        def base(matrix: str) -> np.ndarray:
            return read_back(graph, matrix, self._system.router.weights)

        with self._stages.stage(f"approximating {expert} on the {precision} base", weight_count(changed.graph)) as advance:
            return approximate(changed, base, ranks.of, advance)

    def _set_apart(self, graph: Graph, pairing: Pairing) -> tuple[FactorLayout, dict[str, str]]:
        """Let the graph take what experts add to the router. Returns how an expert's factors lie in its inputs, and the
        input b of each matrix.
        """
        terms = {name for delta in self._deltas.values() for name in (*delta.terms, *delta.matrices)}
        others = {name for delta in self._deltas.values() for name in delta.vectors}
        ranks = {
            name: max(matrix_rank(source, delta) for delta in self._deltas.values())
            for name, source in graph.sources.items()
            if terms.intersection(source.tensors)
        }
        vectors = [name for name, source in graph.sources.items() if others.intersection(source.tensors)]
        factors = pairing.apart(graph, ranks, vectors)
        inputs = {name: b for each in factors for name, b in each.b.items()}
        return layout_of(graph, factors, vectors, self._system.router.weights), inputs

    def _every_expert(self, layout: FactorLayout, head: ir.Model | None) -> bool:
        """Whether all experts may read in one pass: each is low-rank factors of what stands before the head."""
        return head is not None and not self._apart and not self._approximated and not layout.plan.vectors and len(self._sharing) > 1

    def _write_factors(self, expert: str, arrays: FactorArrays) -> str:
        """Write an expert's factors, once where precisions agree on them. Returns the path in the bundle."""
        path, entry = write_factors(self._folder / FACTORS, expert, arrays.entries, arrays.arrays())
        name = path.relative_to(self._folder).as_posix()
        self._factor_files[name] = entry
        return name

    def _write_adapting(self, layout: FactorLayout) -> Adapting | None:
        """Write what it takes to add experts, once where precisions agree on it. None where the router is no adapter."""
        if (base_alone := unadapted(self._system)) is None:
            return None
        base, delta = base_alone
        folder = self._graphs / ADAPTING
        vectors = [tensor for vector in layout.plan.vectors for tensor, _ in vector.tensors]
        written = write_unadapted(folder, delta, base.weights, vectors), write_layout(folder, layout)
        return Adapting(**dict(zip(("unadapted", "layout"), map(self._listed, written), strict=True)))

    def _listed(self, written: Written) -> str:
        """The path of a file in the bundle, whose entry is noted for the manifest."""
        name = written.path.relative_to(self._folder).as_posix()
        self._factor_files[name] = File.of(written.digest)
        return name

    def gather_weights(self, variants: Sequence[Variant]) -> dict[str, File]:
        """Gather the base's weights in one file, those of each expert apart in another, and remove what no graph reads.

        Returns what the manifest says of it and of the factors, by their paths in the bundle.
        """
        with self._stages.stage("gathering the weights"):
            files, graphs = WeightFiles(self._store), {BASE: [path for each in variants if each.pair for path in each.pair.graph_paths]}
            graphs |= {expert.name: [each.graphs[expert.name] for each in variants] for expert in self._apart}
            planned = {per_model(name): files.plan(per_model(name), [self._folder / path for path in own]) for name, own in graphs.items()}
            entries = {f"{GRAPHS}/{location}": file.write() for location, file in planned.items()}
            files.remove_unread()
        return self._factor_files | {name: entry for name, entry in entries.items() if entry is not None}


def base_evidence(router: Checkpoint, experts: Sequence[Checkpoint], evidence: Mapping[str, Evidence]) -> dict[str, Evidence]:
    """What the base is fitted with: what router and experts read through it. Empty where activations are not known."""
    if not evidence:
        return {}
    return {router.name: pooled(evidence[router.name], [(expert.weights, evidence[expert.name]) for expert in experts])}
