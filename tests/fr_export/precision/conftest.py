"""A router planned for W8A8 and written."""

from typing import Any

import onnx_ir as ir
import pytest

from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.precision.plan_w8a8 import choose
from fusionroute.fr_export.precision.smoothquant import for_tensors, smooth
from fusionroute.fr_export.precision.w8a8 import PlannedW8A8
from tests.support.calibration import observe, traced, written
from tests.support.planned_router import IDS, SHAPES, PlannedRouter, uneven
from tests.support.sparing import sparing
from tests.support.systems import make_system


@pytest.fixture(scope="session", params=sparing(SHAPES, ("smollm3", "gemma3", "phi3")))
def planned_router(request: Any, tmp_path_factory: pytest.TempPathFactory) -> PlannedRouter:
    """A smoothed router, planned and written."""
    folder, shape = tmp_path_factory.mktemp("system"), SHAPES[request.param]
    router, experts = make_system(folder, shape)
    system = System.open(FAMILIES[shape.family], router, experts, max_seq_len=64)
    graph, weights = traced(system), system.router.weights
    graph, _ = smooth(graph, weights, observe(graph, weights, [IDS]), for_tensors)
    seen = observe(graph, weights, [IDS])
    noise = uneven(graph)
    chosen = choose(graph, weights, seen, noise)
    path = written(graph, weights, folder / "out", PlannedW8A8(chosen), system.head)
    return PlannedRouter(system, graph, seen, noise, chosen, path, ir.load(path).graph)
