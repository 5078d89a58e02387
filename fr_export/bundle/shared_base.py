"""Whether the models of a system can share one base, what each expert adds to it, and how that is approximated."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from fusionroute.fr_export.checkpoints.deltas import Delta, delta_of, unshared
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.graphs.decoder_blocks import reader
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.trace import architecture
from fusionroute.fr_export.graphs.traces import Traces
from fusionroute.fr_export.precision.approximation import ChangedExpert, spectra
from fusionroute.fr_export.precision.evidence import Evidence
from fusionroute.fr_export.precision.rank_budget import RankBudget, Ranks


class Approximated(NamedTuple):
    """An expert whose matrices have become others, and the ranks of the factors that stand for what they changed by."""

    expert: ChangedExpert
    ranks: Ranks


def deltas(system: System, approximate: bool = False) -> dict[str, Delta]:
    """Expert → what it adds to the router's weights. Raises InputError, which names an expert that cannot share them.

    `approximate`: matrices that no low-rank terms turn into the expert's can share too.
    """
    expected = architecture(system.router.config, system.vocab_size)
    for expert in system.experts:
        if architecture(expert.config, system.vocab_size) != expected:
            raise unshared(expert, "their config.json files describe two architectures")
    return {expert.name: delta_of(system.router, expert, approximate) for expert in system.experts}


def approximations(
    system: System, deltas: Mapping[str, Delta], budget: RankBudget, traces: Traces, evidence: Mapping[str, Evidence], stages: Stages
) -> dict[str, Approximated]:
    """The experts whose matrices are approximated, with ranks by what they change on the texts of `evidence` (none: by the
    weights alone). Raises InputError as `Weights` and `BlockwiseForward` do.
    """
    graphs, router = traces.of(), system.router
    changed = {
        expert.name: ChangedExpert.of(graphs[expert.name], expert.weights, evidence[expert.name].texts if evidence else (), delta)
        for expert in system.experts
        if (delta := deltas[expert.name]).matrices
    }
    if not changed:
        return {}
    _, base = reader(graphs[router.name], router.weights)
    weights = weight_count(graphs[router.name])
    approximated = {}
    with stages.stage("measuring what experts change", len(changed) * weights) as advance:
        for name, expert in changed.items():
            approximated[name] = Approximated(expert, budget.spread(list(spectra(expert, base, advance)), weights))
    return approximated


def weight_count(graph: Graph) -> int:
    """How many values the matrices of a model have. A tied embedding counts once."""
    values = graph.model.graph.initializers
    shapes = [values[name].shape for name, source in graph.sources.items() if source.tensors and name in values]
    return sum(int(np.prod(shape)) for shape in shapes if len(shape) == 2)
