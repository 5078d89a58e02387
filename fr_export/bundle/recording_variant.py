"""The variant that a system generates its calibration texts with: one graph for all models that share a base."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from fusionroute.fr_export.bundle.targets import FUSION_GRAPH, GRAPHS, named
from fusionroute.fr_export.bundle.variant import VariantWriter
from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.checkpoints.deltas import Delta
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.graphs.batch_dimension import batched
from fusionroute.fr_export.graphs.decoder_blocks import reader
from fusionroute.fr_export.graphs.dialects import ort
from fusionroute.fr_export.graphs.factor_arrays import low_rank
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.passes import models_in_batch
from fusionroute.fr_export.graphs.passes.models_in_batch import Change
from fusionroute.fr_export.graphs.traces import Traces
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision import Scheme
from fusionroute.fr_export.precision.bind_weights import bind
from fusionroute.fr_export.precision.fit_model import fit_model
from fusionroute.fr_export.precision.shared_matrices import SharedMatrices
from fusionroute.runtime.backends.ort_cpu import TARGET as CPU
from fusionroute.runtime.manifest import BASE, Variant


def recording_variant(system: System, deltas: Mapping[str, Delta], traces: Traces, scheme: Scheme, folder: Path, stages: Stages) -> Variant:
    """Write the models into a bundle folder: the router and the experts of `deltas`, which low-rank factors turn into it,
    in one graph that takes their texts in a batch; every other expert in a graph of its own.

    Where that graph takes no batch, all have graphs of their own. Raises as `VariantWriter.write`.
    """
    sharing = [expert for expert in system.experts if expert.name in deltas]
    path = write_base(system, sharing, deltas, traces, scheme, folder, stages) if sharing else None
    if path is None:
        return VariantWriter(system, traces, {}, folder, stages, windows=False).write(CPU, scheme).variant
    graphs = {model.name: path for model in (system.router, *sharing)}
    if apart := [expert for expert in system.experts if expert.name not in deltas]:
        graphs |= VariantWriter(system, traces, {}, folder, stages, apart, windows=False).write(CPU, scheme).variant.graphs
    return Variant(target=CPU, precision=scheme.name, graphs=graphs, fusion_graph=FUSION_GRAPH, bits_per_weight=scheme.bits)


def write_base(
    system: System, experts: Sequence[Checkpoint], deltas: Mapping[str, Delta], traces: Traces, scheme: Scheme, folder: Path, stages: Stages
) -> str | None:
    """Write the graph of the router and some experts. Returns its path in the folder, None where it takes no batch."""
    router, path, store = system.router, named(BASE, CPU, scheme.name, True), Store(folder / GRAPHS)
    with stages.stage(f"writing {scheme.name} for {CPU}, one base", traces.of()[router.name].parameters) as advance:
        graph, own, _ = fit_model(router, ort, scheme, traces, {}, store, SharedMatrices(), advance)
        models_in_batch(graph, [change(graph, expert, deltas[expert.name]) for expert in experts], store)
        ort.end_with(graph, system.head)
        bind(graph, router.weights, own, store, advance)
        ir.save(graph.model, folder / path)
    return path if batched(folder / path) is not None else None


def change(graph: Graph, expert: Checkpoint, delta: Delta) -> Change:
    """What an expert adds to the base, by the names that a graph gives to its weights."""
    _, read = reader(graph, expert.weights)
    sources = dict(graph.sources)

    def vector(name: str) -> np.ndarray | None:
        return read(name) if delta.vectors.intersection(sources[name].tensors) else None

    return Change(lambda name: low_rank(sources[name], delta, expert.weights), vector)
