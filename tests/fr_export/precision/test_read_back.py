"""Matrices read back from a bound graph are those that its products compute with."""

from pathlib import Path

import numpy as np
import pytest

from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision import SCHEMES
from fusionroute.fr_export.precision.bind_weights import bind
from fusionroute.fr_export.precision.read_back import read_back
from fusionroute.fr_export.precision.row_int8 import RowInt8
from fusionroute.fr_export.precision.smoothquant import for_blocks, smooth
from tests.support.calibration import observe, traced
from tests.support.systems import Shape, make_system

IDS = np.random.default_rng(5).integers(3, 300, 40).tolist()
# the largest error, of a row's largest weight: half a step of the format; int4 clips ranges to seven tenths
ERRORS = {"fp32": 1e-6, "fp16": 2**-11, "bf16": 2**-8, "int8": 0.51 / 127, "int8 by row": 0.51 / 127, "int4": 0.31}


@pytest.fixture(scope="module")
def traced_system(tmp_path_factory: pytest.TempPathFactory) -> tuple[System, Graph]:
    """Smoothed, so that sources have scales."""
    router, experts = make_system(tmp_path_factory.mktemp("system"), Shape("llama3", hidden=128, layers=1, experts=1))
    system = System.open(None, router, experts)
    graph = traced(system)
    return system, smooth(graph, system.router.weights, observe(graph, system.router.weights, [IDS]), for_blocks)[0]


@pytest.mark.parametrize("precision", ERRORS)
def test_matrices_come_back_as_they_were_rounded(precision: str, traced_system: tuple[System, Graph], tmp_path: Path) -> None:
    system, smoothed = traced_system
    graph, weights = smoothed.clone(), system.router.weights
    scheme = RowInt8() if precision == "int8 by row" else SCHEMES["ort:cpu"][precision]
    bind(graph, weights, scheme, Store(tmp_path), lambda _: None)
    errors = []
    for name, source in smoothed.sources.items():
        if len(smoothed.model.graph.initializers[name].shape) != 2 or not source.tensors:
            continue
        exact = np.concatenate([weights.read(tensor) for tensor in source.tensors])
        values = read_back(graph, name, weights)
        assert values.shape == exact.shape
        scale = np.ones_like(exact) if source.column_scale is None else np.broadcast_to(source.column_scale, exact.shape)
        if source.row_scale is not None:
            scale = scale * source.row_scale[:, None]
        largest = np.abs(exact * scale).max(axis=1, keepdims=True)
        errors.append(float((np.abs(values - exact) * scale / largest).max()))
    assert len(errors) == 7 and max(errors) <= ERRORS[precision]
    if precision != "fp32":
        assert min(errors) > ERRORS[precision] / 8, "values that are not rounded are not those of the products"
