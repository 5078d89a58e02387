"""One model's graph and scheme, ready to bind: fitted where its activations are known."""

from collections.abc import Callable, Mapping
from typing import Any

from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.graphs.dialects import Dialect
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.traces import Traces
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision.carried import Carried, carry, carrying
from fusionroute.fr_export.precision.evidence import Evidence
from fusionroute.fr_export.precision.fit_context import FitContext
from fusionroute.fr_export.precision.kept_matrices import KeptMatrices
from fusionroute.fr_export.precision.scheme import Carrying, Fitting, Scheme
from fusionroute.fr_export.precision.shared_matrices import SharedMatrices


def fit_model(
    model: Checkpoint, dialect: Dialect, scheme: Scheme, traces: Traces, evidence: Mapping[str, Evidence], store: Store,
    shared: SharedMatrices, advance: Callable[[int], None], number: int = 0, threads: int | None = None,
    kept: KeptMatrices | None = None, note: Callable[[str], None] = lambda _: None,
) -> tuple[Graph, Scheme, dict[str, Any] | None]:  # fmt: skip
    """A copy of a model's trace in a dialect and the scheme to bind it with, and what fitting reports (None: nothing).

    `evidence`: of every model, or empty where activations are not known. `note` is told what was taken over from `kept`.
    The other arguments: see `FitContext`.
    """
    trace = traces.of(dialect)[model.name]
    if not (isinstance(scheme, Fitting) and evidence):
        carried = carry(trace, model.weights, scheme.carries, store, advance) if isinstance(scheme, Carrying) else {}
        scheme = carrying(scheme, carried, trace)
        return trace.clone(), scheme, scheme.about if isinstance(scheme, Carried) else None
    context = FitContext(
        traces.of()[model.name], model.weights, evidence[model.name], store, shared, advance, number, threads, kept,
        lambda how_much: note(f"resumed: {scheme.name} of {model.name}, {how_much}"),
    )  # fmt: skip
    with shared.model(number):
        graph, fitted = scheme.fit(context)
    return trace.with_sources_of(graph).clone(), fitted, fitted.about
