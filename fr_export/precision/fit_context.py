"""What a precision is given to fit one model."""

from collections.abc import Callable
from dataclasses import dataclass, field

from fusionroute.fr_export.checkpoints.weights import Weights
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision.blockwise import Stored
from fusionroute.fr_export.precision.evidence import Evidence
from fusionroute.fr_export.precision.smoothquant import Choice


@dataclass
class SharedMatrices:
    """What the models of one variant have in common, by the content of the matrices: it is stored once, as the first
    model rounded it.
    """

    scales: dict[str, Choice] = field(default_factory=dict)
    stored: dict[str, Stored] = field(default_factory=dict)


@dataclass(frozen=True)
class FitContext:
    """One model, what calibration learned of it, and where its matrices go.

    `graph` is a trace in the `ort` dialect. `shared` is empty for the first model of a variant and is then handed on.
    `advance(n)` is told of every n values done.
    """

    graph: Graph
    weights: Weights
    evidence: Evidence
    store: Store
    shared: SharedMatrices
    advance: Callable[[int], None]
