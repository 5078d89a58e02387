"""Systems of adapters, exported and run, against PEFT; their quantised bundles against those of PEFT's merged models."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.export import Request, export
from fusionroute.fr_export.verify import torch_reference
from tests.support.adapters import TARGETS, make_adapted_system, peft_model
from tests.support.exporting import export_checkpoints
from tests.support.parity import check_parity
from tests.support.systems import Shape

# the router, then the experts
UNTIED: list[dict[str, Any]] = [
    {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}},
    {"target_modules": [*TARGETS, "embed_tokens", "lm_head"], "use_rslora": True},
    {"use_dora": True, "modules_to_save": ["norm"]},
]
TIED: list[dict[str, Any]] = [{}, {"target_modules": [*TARGETS, "lm_head"]}, {"modules_to_save": ["embed_tokens"]}]
IDS = np.random.default_rng(5).integers(3, 300, 60).tolist()


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (Shape("llama3", heads=2, kv_heads=1, layers=1, tokenizer=True), UNTIED),
        (
            Shape("gemma2", heads=2, kv_heads=1, layers=1, tokenizer=True),
            TIED,
        ),  # experts whose heads are parted from embeddings that the router ties
    ],
    ids=["llama3", "gemma2"],
)
def test_parity(shape: Shape, options: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, router, experts = make_adapted_system(tmp_path, shape, options)
    bundle = export_checkpoints(tmp_path / "bundle", shape, router, experts, ("fp32",))

    def load(checkpoint: Checkpoint) -> Any:
        return peft_model(base, checkpoint.folder).get_base_model()

    monkeypatch.setattr(torch_reference, "load", load)
    check_parity(bundle, System.open(None, router, experts), IDS, 20)


def test_quantised_reports_are_those_of_merged_models(tmp_path: Path) -> None:
    """int8 and int4 lose as much as they do on models that PEFT merged and wrote to disk."""
    shape = Shape("llama3", layers=1, hidden=32, heads=2, kv_heads=1, head_dim=16, experts=2, tokenizer=True)
    base, router, experts = make_adapted_system(tmp_path, shape, UNTIED)
    merged = {}
    for name, folder in {"router": router, **experts}.items():
        merged[name] = tmp_path / "merged" / name
        peft_model(base, Path(folder)).merge_and_unload().save_pretrained(merged[name])
        for text in ("tokenizer.json", "tokenizer_config.json"):
            (merged[name] / text).write_bytes((base / text).read_bytes())
    (merged["router"] / "routing_head.safetensors").write_bytes((Path(router) / "routing_head.safetensors").read_bytes())

    def report(out: str, router: str, experts: dict[str, str]) -> dict[str, Any]:
        request = Request(None, router, experts, ("int8", "int4"), ("ort:cpu",), tmp_path / out, calibration="none", max_seq_len=128)
        return export(request, Stages(Console(quiet=True)))

    adapted = report("adapted", router, experts)
    whole = report("whole", str(merged.pop("router")), {name: str(folder) for name, folder in merged.items()})
    for mine, its in zip(adapted["variants"], whole["variants"], strict=True):
        assert (mine["precision"], mine["bytes"]) == (its["precision"], its["bytes"])
        figures = [[entry["compared"]["decode"][name] for name in ("kl_mean", "perplexity", "mean_difference")] for entry in (mine, its)]
        assert figures[0] == pytest.approx(figures[1], rel=1e-3)
        assert figures[0][0] > 0, "quantised"
