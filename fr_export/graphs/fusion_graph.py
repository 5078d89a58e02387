"""The fusion graph: router and expert logits in, the few numbers that sampling needs out (FusionRoute, L = a·L_router + b·L_expert)."""

from pathlib import Path

import onnx
import onnx_ir as ir
from onnx import TensorProto
from onnx_ir.passes.common import InlinePass, RemoveUnusedOpsetsPass
from onnxscript import FLOAT, INT64, script
from onnxscript import opset18 as op  # not 20, whose ReduceMax has no CUDA kernel: https://github.com/microsoft/onnxruntime/issues/27729

# mypy: disable-error-code="valid-type, no-any-return"
# onnxscript reads these annotations, which mypy knows as variables only
LOGITS, CANDIDATES, ROWS = FLOAT["positions", "vocab"], FLOAT["positions", "k"], FLOAT["positions"]
PENALTY_IDS, CANDIDATE_IDS = INT64["positions", "penalised"], INT64["positions", "k"]
ONE, TWO = INT64[1], FLOAT[2]


@script()
def log_sum_exp(rows: LOGITS) -> ROWS:
    """log Σ exp over the last axis, summed in double: in float32 the small terms of 256k tokens are lost (ReduceLogSumExp errs by 1e-2)."""
    last = op.Constant(value_ints=[1])
    peak = op.ReduceMax(rows, last, keepdims=1)
    total = op.ReduceSum(op.Cast(op.Exp(rows - peak), to=TensorProto.DOUBLE), last, keepdims=0)
    return op.Cast(op.Log(total), to=TensorProto.FLOAT) + op.Squeeze(peak, last)


@script()
def fusion(
    router_logits: LOGITS, expert_logits: LOGITS, coefficients: TWO, penalty_ids: PENALTY_IDS, penalty: FLOAT, temperature: FLOAT, k: ONE
) -> tuple[LOGITS, CANDIDATES, CANDIDATE_IDS, ROWS, ROWS, CANDIDATES]:
    """The graph. coefficients: (λ, 1 − λ) weighted, (1, 1) additive; penalty_ids [positions, n] may hold an id twice.

    Returns fused logits after the repetition penalty, their k largest and the ids of these; log-normalisers, of the logits before the penalty
    at temperature 1 and of the penalised ones at the temperature; and the k before the penalty, for their log-probability.

    The penalty (arXiv:1909.05858: positive logits are divided by it, negative ones multiplied) goes in before the candidates are chosen,
    so that none is missed.
    """
    a, b = op.Split(coefficients, num_outputs=2)
    raw = router_logits * a + expert_logits * b
    met = op.GatherElements(raw, penalty_ids, axis=1)
    lowered = op.Where(met > op.Constant(value_float=0.0), met / penalty, met * penalty)
    fused = op.ScatterElements(raw, penalty_ids, lowered, axis=1)
    candidate_logits, candidate_ids = op.TopK(fused, k, axis=1)
    log_normaliser = log_sum_exp(raw)
    sampling_normaliser = log_sum_exp(fused / temperature)
    unpenalised = op.GatherElements(raw, candidate_ids, axis=1)
    return fused, candidate_logits, candidate_ids, log_normaliser, sampling_normaliser, unpenalised


def write_fusion_graph(path: Path) -> None:
    """Write the graph, which serves every family, precision and vocabulary."""
    model = ir.from_proto(fusion.to_model_proto(producer_name="fusionroute"))
    InlinePass()(model)  # TensorRT reads no functions
    RemoveUnusedOpsetsPass()(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    ir.save(model, path)
