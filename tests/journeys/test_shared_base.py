"""Systems with one base, exported and run, against PEFT and plain torch: in chunks, token by token, after rewinds."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.precision.rank_budget import RankBudget
from fusionroute.fr_export.verify import torch_reference
from tests.support.adapters import TARGETS, peft_model
from tests.support.exporting import export_checkpoints
from tests.support.pairs import export_shared
from tests.support.parity import check_parity
from tests.support.sparing import sparing
from tests.support.systems import Shape, make_system

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
