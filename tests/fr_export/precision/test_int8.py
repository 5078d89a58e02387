"""int8's blocks are wide where calibration evened out a matrix's channels, and narrow elsewhere."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.precision.bind_weights import bind
from fusionroute.fr_export.precision.int8 import Int8
from tests.support.calibration import fit_context, known, observe, traced
from tests.support.systems import Shape, make_system

IDS = np.random.default_rng(0).integers(3, 300, 40).astype(np.int32)


@pytest.mark.parametrize(("family", "calibrated"), [("llama3", True), ("gemma2", True), ("llama3", False)])
def test_blocks_of_evened_matrices_are_wide(family: str, calibrated: bool, tmp_path: Path) -> None:
    """The inputs of o_proj and down_proj have 128 channels, the hidden size is 64."""
    router, experts = make_system(tmp_path, Shape(family, experts=1, layers=1))
    system = System.open(FAMILIES[family], router, experts, max_seq_len=64)
    graph, weights = traced(system), system.router.weights
    evidence = known([IDS])
    if calibrated:
        evidence = replace(evidence, observed=observe(graph, weights, [IDS.tolist()]))
    context = fit_context(graph, weights, evidence, tmp_path / "store")
    rounded, scheme = Int8().fit(context)
    bind(rounded, weights, scheme, context.store, context.advance)
    products = [node.attributes for node in rounded.model.graph if node.op_type == "MatMulNBits"]
    blocks = {(each["K"].as_int(), each["block_size"].as_int()) for each in products}
    assert blocks == {(64, 64), (128, 128 if calibrated else 64)}
