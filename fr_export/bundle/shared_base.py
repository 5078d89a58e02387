"""Whether the models of a system can share one base, and what each expert adds to it."""

from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.checkpoints.deltas import Delta, delta_of, unshared
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.graphs.trace import architecture


def deltas(system: System) -> dict[str, Delta]:
    """Expert → what it adds to the router's weights. Raises InputError, which names an expert that cannot share them."""
    expected = architecture(system.router.config, system.vocab_size)
    for expert in system.experts:
        if architecture(expert.config, system.vocab_size) != expected:
            raise unshared(expert, "their config.json files describe two architectures")
    return {expert.name: delta_of(system.router, expert) for expert in system.experts}


def unadapted(system: System) -> tuple[Checkpoint, Delta]:
    """The base without any adapter, and what it adds to the router's weights."""
    base = system.router.base or system.router
    return base, delta_of(system.router, base)
