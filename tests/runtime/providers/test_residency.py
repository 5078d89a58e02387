"""A budget for experts on ONNX Runtime's GPU backends, on the CPU provider: the same tokens, to the last bit."""

from pathlib import Path

import numpy as np
import pytest

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.backends.ort_gpu import OrtGpu
from fusionroute.runtime.bundle import Bundle
from tests.runtime.providers.conftest import on_cpu
from tests.support.in_threads import generated_together


@pytest.mark.parametrize(("target", "precision"), [("ort:cuda", "fp16"), ("tensorrt", "fp32")])
def test_results_are_those_without_a_budget(bundles: dict[str, Path], target: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bundles["llama3"]
    bundle = Bundle.open(folder)
    size = max(bundle.stored_bytes(graph) for graph in bundle.variant(target, precision).graphs.values())
    ids = [int(word) for word in np.random.default_rng(0).integers(3, 300, 150)]
    prompts = [ids[start : start + 20] for start in range(0, 80, 20)]
    with on_cpu(target), FusionRuntime.load(folder, precision, "bound") as rt:
        assert rt.backend.expect is None
        expected = rt.score(ids, chunk=1), rt.generate(ids[:40], 20), [rt.generate(prompt, 5).token_ids for prompt in prompts]
    with on_cpu(target), FusionRuntime.load(folder, precision, "bound", expert_memory=size) as rt:
        assert isinstance(rt.backend, OrtGpu) and rt.backend.expect is not None
        scores, result, together = rt.score(ids, chunk=1), rt.generate(ids[:40], 20), generated_together(rt, prompts, 5)
    assert np.array_equal(scores.logits, expected[0].logits) and len(set(scores.experts.tolist())) == 2
    assert (result.token_ids, result.logprobs, together) == (expected[1].token_ids, expected[1].logprobs, expected[2])
