"""The table of targets: what a traced graph becomes before it gets weights. A new target is one line here and one among the SCHEMES."""

from collections.abc import Callable
from dataclasses import dataclass

from fr_export.families import Family
from fr_export.graph import Graph
from fr_export.lowerings import Lowering, ort, tensorrt
from fr_export.passes import narrow
from fr_export.precision.half import TYPES

Prepare = Callable[[Graph, str, Family], None]  # (graph, precision, family): rewrites the graph


@dataclass(frozen=True)
class Target:
    """The dialect that models are traced in, and what is done to a copy of the trace for one precision."""

    lowering: Lowering
    prepare: Prepare


def as_traced(graph: Graph, precision: str, family: Family) -> None:
    """Activations stay fp32."""


def half_activations(graph: Graph, precision: str, family: Family) -> None:
    """Activations in the precision's type, or the family's half precision; the residual stream in fp32 where the family's needs it."""
    narrow(graph, TYPES[precision if precision in TYPES else family.half][1], family.wide_residual)


def strongly_typed(graph: Graph, precision: str, family: Family) -> None:
    """Activations in half precision, but in fp32 graphs."""
    if precision != "fp32":
        half_activations(graph, precision, family)


TARGETS: dict[str, Target] = {
    "ort:cpu": Target(ort, as_traced),
    "ort:cuda": Target(ort, half_activations),
    "tensorrt": Target(tensorrt, strongly_typed),
}
