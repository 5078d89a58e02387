"""Decoder blocks built by hand for blockwise forward passes, and the inputs of their matrices in numpy."""

from typing import Any

import numpy as np
from onnx import TensorProto, helper

from fusionroute.calibration.block import Block

H, V, LAYERS = 8, 20, 3
RNG = np.random.default_rng(0)
WEIGHTS = {f"layers.{layer}.w": RNG.standard_normal((H, H)).astype(np.float32) for layer in range(LAYERS)}
WEIGHTS["norm"] = RNG.standard_normal(H).astype(np.float32)
TABLE = RNG.standard_normal((V, H)).astype(np.float32)
TEXTS = [RNG.integers(0, V, length).astype(np.int32) for length in (1, 5, 3)]


def graph(nodes: list[Any], inputs: dict[str, list[Any]], outputs: list[str]) -> bytes:
    input_infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    output_infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    body = helper.make_graph(nodes, "block", input_infos, output_infos)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def blocks() -> list[Block]:
    """Three layers x → x + tanh(x)·w, each of whose sums is computed in the next block; then a norm."""
    state = [1, "sequence", H]
    layers = []
    for layer in range(LAYERS):
        into = ("state.0", "state.1")[: 1 if layer == 0 else 2]
        nodes = [] if layer == 0 else [helper.make_node("Add", ["state.0", "state.1"], ["sum"])]
        x = "state.0" if layer == 0 else "sum"
        nodes += [
            helper.make_node("Identity", [x], ["skip"]),
            helper.make_node("Tanh", [x], ["inner"]),
            helper.make_node("MatMul", ["inner", "w"], ["product"]),
        ]
        cut = graph(nodes, dict.fromkeys(into, state) | {"w": [None, None]}, ["inner", "skip", "product"])
        name = f"layers.{layer}.w"
        layers.append(Block(f"layers.{layer}", cut, into, ("skip", "product"), {name: "inner"}, {name: H}, {"w": name}))
    nodes = [helper.make_node("Add", ["state.0", "state.1"], ["sum"]), helper.make_node("Mul", ["sum", "norm"], ["final"])]
    head = graph(nodes, {"state.0": state, "state.1": state, "norm": [H]}, ["final"])
    return [*layers, Block("head", head, ("state.0", "state.1"), ("final",), {"lm_head": "final"}, {"lm_head": H}, {"norm": "norm"})]


def expected(text: np.ndarray, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inputs of each matrix, in numpy."""
    x, inputs = TABLE[text], {}
    for layer in range(LAYERS):
        inputs[f"layers.{layer}.w"] = np.tanh(x)
        x = x + np.tanh(x) @ weights[f"layers.{layer}.w"]
    return inputs | {"lm_head": x * weights["norm"]}
