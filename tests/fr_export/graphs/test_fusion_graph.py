"""The fusion graph against double-precision numpy, at the size of real vocabularies."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from fusionroute.fr_export.graphs.fusion_graph import write_fusion_graph


@pytest.mark.parametrize("peak", [0.0, 16.8])
def test_normalisers_hold_for_256k_tokens(peak: float, tmp_path: Path) -> None:
    """A row with one likely token and a long flat tail, and a flat one: sums in float32 lose the tail."""
    write_fusion_graph(tmp_path / "fusion.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "fusion.onnx"))
    rng = np.random.default_rng(0)
    router, expert = (rng.normal(0, 0.1, (1, 256_000)).astype(np.float32) for _ in range(2))
    router[0, 0] += 2 * peak
    inputs = {
        "router_logits": router, "expert_logits": expert, "coefficients": np.array([0.5, 0.5], np.float32),
        "penalty_ids": np.array([[0, 7]], np.int64), "penalty": np.array(1.1, np.float32), "temperature": np.array(0.8, np.float32), "k": np.array([5], np.int64),
    }  # fmt: skip
    names = ("fused", "candidate_logits", "candidate_ids", "unpenalised", "log_normaliser", "sampling_normaliser")
    fused, logits, ids, unpenalised, log_normaliser, sampling = session.run(names, inputs)
    raw = 0.5 * router.astype(np.float64) + 0.5 * expert
    expected = raw.copy()
    expected[0, [0, 7]] = np.where(raw[0, [0, 7]] > 0, raw[0, [0, 7]] / 1.1, raw[0, [0, 7]] * 1.1)
    assert np.allclose(fused, expected, atol=1e-5)
    order = np.argsort(-fused[0], kind="stable")[:5]
    assert (ids[0] == order).all() and (logits[0] == fused[0, order]).all()
    assert np.allclose(unpenalised[0], raw[0, order], atol=1e-5)
    for normaliser, rows in ((log_normaliser, raw), (sampling, expected / np.float32(0.8))):
        top = rows.max()
        assert float(normaliser[0]) == pytest.approx(top + np.log(np.exp(rows - top).sum()), abs=1e-5)
