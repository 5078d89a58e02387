"""Systems with one base, exported and run, against PEFT and plain torch: in chunks, token by token, after rewinds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.checkpoints.torch_model import torch_model
from fusionroute.fr_export.precision.rank_budget import RankBudget
from fusionroute.fr_export.verify import torch_reference
from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.manifest import Manifest
from tests.support.adapters import TARGETS, make_adapted_system, peft_model
from tests.support.exporting import export_checkpoints
from tests.support.pairs import export_shared
from tests.support.parity import check_parity
from tests.support.sparing import sparing
from tests.support.systems import Shape, make_model, make_system

SMALL: dict[str, Any] = {"heads": 2, "kv_heads": 1, "hidden": 32, "tokenizer": True}
IDS = np.random.default_rng(5).integers(3, 300, 100).tolist()
# the router, then the experts: ranks and matrices differ; one expert trains norms too
FIVE: list[dict[str, Any]] = [
    {"target_modules": TARGETS[:4]},
    {"r": 3, "rank_pattern": {"q_proj": 5}},
    {"r": 2, "modules_to_save": ["input_layernorm", "norm"]},
    {"r": 1, "target_modules": ["down_proj"]},
    {"r": 16, "use_rslora": True},
    {"target_modules": ["o_proj", "up_proj"]},
]


@pytest.mark.parametrize(
    ("shape", "options"),
    [(Shape("llama3", head_dim=16, layers=2, **SMALL), FIVE), (Shape("gemma2", head_dim=16, layers=2, **SMALL), [{}, {"r": 2}])],
    ids=["llama3-five-experts", "gemma2-one-expert"],
)
def test_parity(shape: Shape, options: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = export_shared(tmp_path, shape, options)

    def load(checkpoint: Checkpoint) -> Any:
        return peft_model(shared.base, checkpoint.folder).get_base_model()

    monkeypatch.setattr(torch_reference, "load", load)
    check_parity(shared.bundle, System.open(None, shared.router, shared.experts), IDS, 40)


def test_experts_that_cannot_share_stand_beside_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of more layers, and one that factors of rank 1 do not come close to."""
    shape = Shape("llama3", head_dim=16, layers=1, **SMALL)
    base, router, experts = make_adapted_system(tmp_path, shape, [{}, {}, {}, {"r": 2}])
    experts["expert0"] = str(make_model(tmp_path / "deeper", replace(shape, layers=2), 7, expert=True))
    experts["expert1"] = str(make_model(tmp_path / "other", shape, 8, expert=True))
    bundle = export_checkpoints(
        tmp_path / "bundle", shape, router, experts, ("fp32", "int8"), shared_base=True, budget=RankBudget(rank=1), leave_apart=True
    )
    for variant in Manifest.read(bundle).variants:
        assert variant.pair is not None and variant.pair.factors.keys() == {"expert2"} and variant.graphs.keys() == {"expert0", "expert1"}

    def load(checkpoint: Checkpoint) -> Any:
        adapted = (checkpoint.folder / "adapter_config.json").exists()
        return peft_model(base, checkpoint.folder).get_base_model() if adapted else torch_model(checkpoint)

    monkeypatch.setattr(torch_reference, "load", load)
    check_parity(bundle, System.open(None, router, experts), IDS, 40)

    whole = export_checkpoints(tmp_path / "whole", shape, router, experts, ("fp32",))
    with FusionRuntime.load(bundle, "fp32", "cpu") as ours, FusionRuntime.load(whole, "fp32", "cpu") as theirs:
        assert ours.backend.apart == {0, 1}
        for options in ({}, {"expert": "expert0"}, {"expert": "expert2"}, {"lam": 1.0}, {"temperature": 0.8, "seed": 3}):
            one, other = (rt.generate(IDS[:30], 40, **options) for rt in (ours, theirs))
            assert (one.token_ids, one.experts) == (other.token_ids, other.experts), options
        session = ours.session()
        session.append(IDS[:20])
        session._decoder.step.guesses.last = 0
        for _ in range(20):  # an expert apart never reads before it is chosen
            lag = session.lags
            chosen = session.step().expert
            assert all(session.lags[name] == lag[name] + 1 for name in ("expert0", "expert1") if name != chosen)


FINE_TUNES = {
    "llama3": Shape("llama3", head_dim=16, layers=2, **SMALL),
    "gemma2-tied-head-with-softcap": Shape("gemma2", head_dim=16, layers=2, **SMALL),
    "qwen2-biases": Shape("qwen2", layers=2, **SMALL),
    "qwen3-norms-of-heads": Shape("qwen3", head_dim=16, layers=1, **SMALL),
    "phi3-stacked": Shape("phi3", layers=1, **SMALL),
}


@pytest.mark.parametrize("name", sparing(FINE_TUNES, ("qwen3-norms-of-heads", "phi3-stacked")))
def test_full_fine_tunes_are_exact_at_full_rank(name: str, tmp_path: Path) -> None:
    """Models that have no value in common: embedding, head, matrices, norms and biases all differ."""
    shape = FINE_TUNES[name]
    router, experts = make_system(tmp_path, shape)
    bundle = export_checkpoints(tmp_path / "bundle", shape, router, experts, ("fp32",), shared_base=True, budget=RankBudget(rank=64))
    check_parity(bundle, System.open(None, router, experts), IDS, 40)
