"""What a precision is given to fit one model."""

from collections.abc import Callable
from dataclasses import dataclass

from fusionroute.fr_export.checkpoints.weights import Weights
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision.evidence import Evidence
from fusionroute.fr_export.precision.kept_matrices import KeptMatrices
from fusionroute.fr_export.precision.shared_matrices import SharedMatrices


@dataclass(frozen=True)
class FitContext:
    """One model, what calibration learned of it, and where its matrices go.

    `graph` is a trace in the `ort` dialect. `shared` is handed from model to model of a variant, whose numbers count
    from 0. `advance(n)` is told of every n values done. `threads` compute (None: one per core).
    `kept` holds what exports that were ended have rounded already; `note` is told how much of it was taken over.
    """

    graph: Graph
    weights: Weights
    evidence: Evidence
    store: Store
    shared: SharedMatrices
    advance: Callable[[int], None]
    number: int = 0
    threads: int | None = None
    kept: KeptMatrices | None = None
    note: Callable[[str], None] = lambda _: None
