"""The table of targets: what becomes of a traced graph before it gets weights.

A new target is one line here and its schemes in precision/.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from fusionroute.fr_export.bundle import optimum_folder
from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.checkpoints.system import RoutingHead
from fusionroute.fr_export.families import Family
from fusionroute.fr_export.graphs.dialects import Dialect, ort, pair, portable, tensorrt, tensorrt_10_3
from fusionroute.fr_export.graphs.factors import Factors
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.passes import decompose_rmsnorm, expert_factors, pair_segments, to_half
from fusionroute.fr_export.graphs.weight_store import FOLDER
from fusionroute.fr_export.precision.half import TYPES

GRAPHS = "graphs"
FUSION_GRAPH = f"{GRAPHS}/fusion.onnx"
# (graph, precision, family): rewrites the graph
Prepare = Callable[[Graph, str, Family], None]
# (model, target, precision, whether it is the target's first precision) → the graph's path in the bundle
Place = Callable[[str, str, str, bool], str]
# model → the path of its weights, from the folder of its graphs
Weights = Callable[[str], str]
# (folder of the graph, model, vocabulary size, routing head): writes the files beside a graph
Complete = Callable[[Path, Checkpoint, int, RoutingHead | None], None]


def named(model: str, target: str, precision: str, first: bool) -> str:
    """All graphs in one folder, so that they share weights."""
    return f"{GRAPHS}/{model}.{target.replace(':', '-')}.{precision}.onnx"


def in_folders(model: str, target: str, precision: str, first: bool) -> str:
    """A folder per model that is complete alone. The first precision has the name that Optimum looks for."""
    return f"{target}/{model}/{'model' if first else f'model_{precision}'}.onnx"


def per_model(model: str) -> str:
    """A file per model, all in one folder below the graphs."""
    return f"{FOLDER}/{model}.bin"


def beside(model: str) -> str:
    """The name that Optimum fetches together with model.onnx."""
    return "model.onnx_data"


def nothing(folder: Path, model: Checkpoint, vocab_size: int, head: RoutingHead | None) -> None:
    """No files beside the graphs."""


# (graph, ranks by matrix, vectors): takes what experts add through inputs, see `pair_segments`
Apart = Callable[[Graph, Mapping[str, int], Collection[str]], list[Factors]]


@dataclass(frozen=True)
class Pairing:
    """How a graph for router and expert is traced, and rewritten behind `Target.prepare`.

    splits_head: whether a head that they share becomes a graph of its own. every_expert: whether experts get a segment
    each, see `segment_per_expert`.
    """

    dialect: Dialect
    apart: Apart
    splits_head: bool = False
    every_expert: bool = False


@dataclass(frozen=True)
class Target:
    """How models are traced (`dialect`), rewritten for a precision (`prepare`) and stored (`place`, `weights`, `complete`).

    `pair`: how models that share one base are; None: they cannot.
    """

    dialect: Dialect
    prepare: Prepare
    place: Place = named
    weights: Weights = per_model
    complete: Complete = nothing
    pair: Pairing | None = None


def as_traced(graph: Graph, precision: str, family: Family) -> None:
    """Activations stay fp32."""


def half_activations(graph: Graph, precision: str, family: Family) -> None:
    """Activations in the precision's type or the family's half precision; a wide residual stream stays in fp32."""
    to_half(graph, TYPES[precision if precision in TYPES else family.half][1], family.wide_residual, family.wide_scores)


def strongly_typed(graph: Graph, precision: str, family: Family) -> None:
    """Activations in half precision, except in fp32 graphs."""
    if precision != "fp32":
        half_activations(graph, precision, family)


def portable_activations(graph: Graph, precision: str, family: Family) -> None:
    """Activations in fp16 or bf16 for the precision of that name, else in fp32. Norms in primitive operators."""
    if precision in TYPES:
        half_activations(graph, precision, family)
    decompose_rmsnorm(graph)


def strongly_typed_primitive(graph: Graph, precision: str, family: Family) -> None:
    """As `strongly_typed`, with norms in primitive operators."""
    strongly_typed(graph, precision, family)
    decompose_rmsnorm(graph)


TARGETS: dict[str, Target] = {
    "ort:cpu": Target(ort, as_traced, pair=Pairing(ort, pair_segments, splits_head=True, every_expert=True)),
    "ort:cuda": Target(ort, half_activations, pair=Pairing(ort, pair_segments)),
    "portable": Target(portable, portable_activations, in_folders, beside, optimum_folder.complete),
    "tensorrt": Target(tensorrt, strongly_typed, pair=Pairing(pair.PAIR, expert_factors)),
    "tensorrt:10.3": Target(tensorrt_10_3, strongly_typed_primitive, pair=Pairing(pair.PAIR_10_3, expert_factors)),
}
