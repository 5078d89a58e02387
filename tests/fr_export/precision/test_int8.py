"""int8's blocks are wide where calibration evened out a matrix's channels, and narrow elsewhere; wide gate and up
projections have one scale per row then.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.precision import int8
from fusionroute.fr_export.precision.bind_weights import bind
from fusionroute.fr_export.precision.int8 import Int8
from tests.support.calibration import fit_context, known, observe, run, traced, written
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


@pytest.mark.parametrize("family", ["llama3", "gemma2"])
def test_wide_evened_gates_have_one_scale_per_row(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are as near to fp32's as with blocks: a matrix that is read turned or unscaled would be far off."""
    router, experts = make_system(tmp_path, Shape(family, experts=1, layers=1))
    system = System.open(FAMILIES[family], router, experts, max_seq_len=64)
    graph, weights = traced(system), system.router.weights
    evidence = replace(known([IDS]), observed=observe(graph, weights, [IDS.tolist()]))
    exact = run(written(graph, weights, tmp_path), IDS.tolist())[0]
    errors = {}
    for rows in (65, 64):  # the hidden size is 64: blocks, then rows
        monkeypatch.setattr(int8, "ROWS", rows)
        context = fit_context(graph, weights, evidence, tmp_path / f"store{rows}")
        rounded, scheme = Int8().fit(context)
        path = written(rounded, weights, context.store.folder.parent, scheme)
        errors[rows] = float(np.square(run(path, IDS.tolist())[0] - exact).mean())
    by_row = {each.inputs[1].name for each in ir.load(path).graph if each.op_type == "MatMulIntegerToFloat"}
    assert {str(name).split(".")[-4] for name in by_row} == {"gate_proj", "up_proj"}
    assert errors[64] == pytest.approx(errors[65], rel=1e-3)  # a row of 64 channels is one block
    assert 0 < errors[64] < 1e-3 * float(np.square(exact).mean())
