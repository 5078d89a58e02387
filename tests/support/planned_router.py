"""A router planned for W8A8: its shapes, the statistics the plan was made from, and the graph written."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from fusionroute.calibration.observers import Observer
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.precision.plan_w8a8 import W8A8Plan, matrices
from tests.support.systems import Shape

IDS = [int(i) for i in np.random.default_rng(0).integers(3, 300, 32)]
SHAPES = {
    "llama3": Shape("llama3", experts=1, config={"tie_word_embeddings": True}),
    "llama3-biased": Shape("llama3", experts=1, head_dim=20, config={"attention_bias": True, "mlp_bias": True}),
    "gemma2": Shape("gemma2", experts=1, config={"tie_word_embeddings": True}),
    "smollm3": Shape("smollm3", experts=1),
    "gemma3": Shape("gemma3", experts=1),
    "phi3": Shape("phi3", experts=1),
}


class PlannedRouter(NamedTuple):
    system: System
    graph: Graph
    seen: dict[str, Observer]
    noise: dict[str, float]
    plan: W8A8Plan
    path: Path
    written: ir.Graph


def uneven(graph: Graph) -> dict[str, float]:
    """A noise for every product, of which some are much louder than others."""
    random = np.random.default_rng(3)
    return {name: float(np.exp(3 * random.standard_normal())) * 1e-6 for name in matrices(graph)}
