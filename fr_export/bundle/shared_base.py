"""Whether the models of a system can share one base, what each expert adds to it, and how that is approximated."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
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
from fusionroute.runtime.errors import InputError

# Of an expert's products, squared, that its factors may leave: there the embedded system of llama3 loses as much as by
# int4 of everything (KL 0.041 and 0.043).
LARGEST_ERROR = 0.005


class Approximated(NamedTuple):
    """An expert whose matrices have become others, and the ranks of the factors that stand for what they changed by."""

    expert: ChangedExpert
    ranks: Ranks


def deltas(system: System, approximate: bool = False, leave_apart: bool = False) -> dict[str, Delta]:
    """Expert → what it adds to the router's weights.

    `approximate`: matrices that no low-rank terms turn into the expert's can share too. `leave_apart`: experts that
    cannot share are left out. Raises InputError, which names an expert that cannot, or the last one where none can.
    """
    shared: dict[str, Delta] = {}
    refusal: InputError | None = None
    for expert in system.experts:
        try:
            shared[expert.name] = delta(system, expert, approximate)
        except InputError as error:
            if not leave_apart:
                raise
            refusal = error
    if refusal is not None and not shared:
        raise refusal
    return shared


def delta(system: System, expert: Checkpoint, approximate: bool) -> Delta:
    """What one expert adds. Raises InputError where it cannot share."""
    if architecture(expert.config, system.vocab_size) != architecture(system.router.config, system.vocab_size):
        raise unshared(expert, "their config.json files describe two architectures")
    return delta_of(system.router, expert, approximate)


def unadapted(system: System) -> tuple[Checkpoint, Delta] | None:
    """The base without any adapter, and what it adds to the router's weights; None where no factors undo the router's."""
    base = system.router.base or system.router
    try:
        return base, delta_of(system.router, base)
    except InputError:  # it has matrices of its own, which can only be approximated
        return None


def approximations(
    system: System, deltas: Mapping[str, Delta], budget: RankBudget, traces: Traces, evidence: Mapping[str, Evidence], stages: Stages
) -> dict[str, Approximated]:
    """The experts whose matrices are approximated, with ranks by what they change on the texts of `evidence` (none: by the
    weights alone). Raises InputError as `Weights` and `BlockwiseForward` do.
    """
    graphs, router = traces.of(), system.router
    changed = {
        expert.name: ChangedExpert.of(
            graphs[expert.name], expert.weights, evidence[expert.name].texts if evidence else (), deltas[expert.name]
        )
        for expert in system.experts
        if expert.name in deltas and deltas[expert.name].matrices
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


def close_enough(
    system: System, deltas: Mapping[str, Delta], approximated: Mapping[str, Approximated], leave_apart: bool
) -> dict[str, Delta]:
    """The deltas of the experts that factors come close to. Raises InputError for one that they do not, unless it may be
    left apart, and where none is left.
    """
    far = {name: each.ranks for name, each in approximated.items() if each.ranks.error > LARGEST_ERROR}
    if far and (not leave_apart or far.keys() == deltas.keys()):
        expert = next(each for each in system.experts if each.name in far)
        ranks = far[expert.name]
        raise InputError(
            f"{expert.where} and the router cannot share one base, since factors of {ranks.bits:.2f} bits per weight leave out "
            f"{ranks.left:.0%} of what it changes, an error of {ranks.error:.1e} of its products where {LARGEST_ERROR:.1e} is allowed: "
            "raise --rank or --delta-bits, or export what cannot share in full beside the base (--shared-base auto)."
        )
    return {name: delta for name, delta in deltas.items() if name not in far}


def weight_count(graph: Graph) -> int:
    """How many values the matrices of a model have. A tied embedding counts once."""
    values = graph.model.graph.initializers
    shapes = [values[name].shape for name, source in graph.sources.items() if source.tensors and name in values]
    return sum(int(np.prod(shape)) for shape in shapes if len(shape) == 2)
