"""The table of targets: what a traced graph becomes before it gets weights. A new target is one line here and one among the SCHEMES."""

from collections.abc import Callable

from fr_export.families import Family
from fr_export.graph import Graph
from fr_export.passes import narrow
from fr_export.precision.half import TYPES

Prepare = Callable[[Graph, str, Family], None]  # (graph, precision, family): rewrites the graph


def as_traced(graph: Graph, precision: str, family: Family) -> None:
    """Activations stay fp32."""


def half_activations(graph: Graph, precision: str, family: Family) -> None:
    """Activations in the precision's type, the residual stream in fp32 where the family's needs it."""
    narrow(graph, TYPES[precision][1], family.wide_residual)


TARGETS: dict[str, Prepare] = {"ort:cpu": as_traced, "ort:cuda": half_activations}
