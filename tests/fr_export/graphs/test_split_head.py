"""A head of its own: both graphs in turn give what the graph gave, and it is known which heads are linear."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.graphs.dialects import ort
from fusionroute.fr_export.graphs.passes import is_linear, split_head
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision import SCHEMES
from fusionroute.fr_export.precision.bind_weights import bind
from tests.support.calibration import traced
from tests.support.systems import Shape, make_system

IDS = np.array([[7, 3, 250, 8, 9]])


@pytest.mark.parametrize(("family", "linear"), [("llama3", True), ("gemma2", False)])  # gemma2 caps its logits
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_body_and_head_give_what_the_graph_gave(family: str, linear: bool, precision: str, tmp_path: Path) -> None:
    system = System.open(None, *make_system(tmp_path / "system", Shape(family, layers=1)))
    graph = traced(system).clone()
    ort.end_with(graph, system.head)
    bind(graph, system.router.weights, SCHEMES["ort:cpu"][precision], Store(tmp_path), lambda _: None)
    ir.save(graph.model, tmp_path / "whole.onnx")
    head = split_head(graph.model)
    ir.save(graph.model, tmp_path / "body.onnx")
    ir.save(head, tmp_path / "head.onnx")
    assert is_linear(head) is linear
    whole, body, top = (onnxruntime.InferenceSession(tmp_path / f"{name}.onnx") for name in ("whole", "body", "head"))
    feeds = {"input_ids": IDS, "logit_positions": np.array([1, 4])}
    feeds |= {"seqlens_k": np.array([4], np.int32), "total_sequence_length": np.array(5, np.int32)}
    for value in whole.get_inputs():
        if value.name.startswith("past."):
            feeds[value.name] = np.zeros((1, value.shape[1], 16, value.shape[3]), np.float32)
    logits, routing = whole.run(["logits", "routing"], feeds)
    hidden, same_routing = body.run(["hidden", "routing"], feeds)
    assert np.array_equal(routing, same_routing)
    assert np.array_equal(top.run(["logits"], {"hidden": hidden})[0], logits)
    assert not any(node.op_type == "Tanh" for node in graph.model.graph), "the cap went with the head"
    assert [value.name for value in head.graph.inputs] == ["hidden"]
