"""The fusion graph: router and expert logits in, the few numbers that sampling needs out (FusionRoute, L = a·L_router + b·L_expert)."""

from pathlib import Path

import onnx
from onnx import TensorProto, helper

INPUTS = {
    "router_logits": (TensorProto.FLOAT, ["positions", "vocab"]),
    "expert_logits": (TensorProto.FLOAT, ["positions", "vocab"]),
    "coefficients": (TensorProto.FLOAT, [2]),  # (λ, 1 − λ) weighted, (1, 1) additive
    "penalty_ids": (TensorProto.INT64, ["positions", "penalised"]),
    "penalty": (TensorProto.FLOAT, []),
    "temperature": (TensorProto.FLOAT, []),
    "k": (TensorProto.INT64, [1]),
}
OUTPUTS = {
    "fused": (TensorProto.FLOAT, ["positions", "vocab"]),  # after the penalty
    "candidate_logits": (TensorProto.FLOAT, ["positions", "k"]),
    "candidate_ids": (TensorProto.INT64, ["positions", "k"]),
    "log_normaliser": (TensorProto.FLOAT, ["positions"]),  # of the fused logits before the penalty, at temperature 1
    "sampling_normaliser": (TensorProto.FLOAT, ["positions"]),  # of the penalised logits at the temperature
    "unpenalised": (
        TensorProto.FLOAT,
        ["positions", "k"],
    ),  # the candidates before the penalty, for their log-probability
}


def write_fusion_graph(path: Path) -> None:
    """Write the graph, which serves every family, precision and vocabulary.

    The repetition penalty (arXiv:1909.05858: positive logits are divided by it, negative ones multiplied) goes in before the
    candidates are chosen, so that none is missed; `penalty_ids` may hold an id twice.
    """
    nodes = [
        helper.make_node("Split", ["coefficients"], ["a", "b"], num_outputs=2),
        helper.make_node("Mul", ["router_logits", "a"], ["router_part"]),
        helper.make_node("Mul", ["expert_logits", "b"], ["expert_part"]),
        helper.make_node("Add", ["router_part", "expert_part"], ["raw"]),
        *log_sum_exp("raw", "log_normaliser"),
        helper.make_node("GatherElements", ["raw", "penalty_ids"], ["met"], axis=1),
        helper.make_node("Div", ["met", "penalty"], ["lowered"]),
        helper.make_node("Mul", ["met", "penalty"], ["deepened"]),
        helper.make_node("Greater", ["met", "zero"], ["positive"]),
        helper.make_node("Where", ["positive", "lowered", "deepened"], ["changed"]),
        helper.make_node("ScatterElements", ["raw", "penalty_ids", "changed"], ["fused"], axis=1),
        helper.make_node("Div", ["fused", "temperature"], ["cooled"]),
        *log_sum_exp("cooled", "sampling_normaliser"),
        helper.make_node("TopK", ["fused", "k"], ["candidate_logits", "candidate_ids"], axis=1),
        helper.make_node("GatherElements", ["raw", "candidate_ids"], ["unpenalised"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "fusion",
        [helper.make_tensor_value_info(name, *kind) for name, kind in INPUTS.items()],
        [helper.make_tensor_value_info(name, *kind) for name, kind in OUTPUTS.items()],
        [
            helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0]),
            helper.make_tensor("last", TensorProto.INT64, [1], [1]),
        ],
    )
    # not 20, whose ReduceMax has no CUDA kernel in older releases (https://github.com/microsoft/onnxruntime/issues/27729)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10, producer_name="fusionroute")
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def log_sum_exp(rows: str, result: str) -> list[onnx.NodeProto]:
    """log Σ exp over the last axis, summed in double: in float32 the small terms of 256k tokens are lost (ReduceLogSumExp errs by 1e-2)."""
    steps = [
        ("ReduceMax", [rows, "last"], "peak", {"keepdims": 1}),
        ("Sub", [rows, f"{result}.peak"], "shifted", {}),
        ("Exp", [f"{result}.shifted"], "terms", {}),
        ("Cast", [f"{result}.terms"], "wide", {"to": TensorProto.DOUBLE}),
        ("ReduceSum", [f"{result}.wide", "last"], "sum", {"keepdims": 0}),
        ("Log", [f"{result}.sum"], "log", {}),
        ("Cast", [f"{result}.log"], "narrow", {"to": TensorProto.FLOAT}),
        ("Squeeze", [f"{result}.peak", "last"], "offset", {}),
    ]
    nodes = [helper.make_node(op, inputs, [f"{result}.{out}"], **attributes) for op, inputs, out, attributes in steps]
    return [*nodes, helper.make_node("Add", [f"{result}.narrow", f"{result}.offset"], [result])]
