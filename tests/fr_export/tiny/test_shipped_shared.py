"""The shipped systems of adapters: their form, that they share one base, and that fusion is worth its while."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from fusionroute.fr_export.bundle.shared_base import deltas
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.families.family import TINY_SYSTEMS
from fusionroute.fr_export.tasks.domains import DOMAINS, draw_many
from fusionroute.fr_export.tiny.architectures import ARCHITECTURES
from fusionroute.fr_export.tiny.workshop import ADAPTER_RANK
from fusionroute.runtime import FusionRuntime
from tests.support.exporting import export_checkpoints
from tests.support.systems import Shape

PROMPTS = 500  # per domain, those of the table in the README there: the gemma2 code expert is ahead by 3 points only


@pytest.fixture(params=ARCHITECTURES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(family: str) -> Path:
    return TINY_SYSTEMS / f"{family}-shared"


def test_the_files_of_both_are_small() -> None:
    systems = [TINY_SYSTEMS / f"{name}-shared" for name in ARCHITECTURES]
    assert sum(path.stat().st_size for system in systems for path in system.rglob("*") if path.is_file()) <= 6_000_000


def test_router_and_experts_are_adapters_of_the_base_beside_them(folder: Path) -> None:
    for name in ("router", *(f"experts/{name}" for name in DOMAINS)):
        config: dict[str, Any] = json.loads((folder / name / "adapter_config.json").read_text())
        assert (folder / name / config["base_model_name_or_path"]).resolve() == folder / "base"
        assert config["r"] == ADAPTER_RANK and not (folder / name / "config.json").exists()
        with safe_open(folder / name / "adapter_model.safetensors", "pt") as file:
            assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118
    for path in folder.rglob("*.json"):
        assert "/tmp" not in path.read_text() and "/home" not in path.read_text()


def test_they_share_one_base(family: str) -> None:
    preset = FAMILIES[family].preset("tiny-shared")
    assert preset.router is not None
    system = System.open(FAMILIES[family], preset.router, dict(preset.experts))
    assert system.head.weight.shape == (len(DOMAINS), 128)
    for delta in deltas(system).values():
        assert len(delta.terms) == 4 * 7 and not delta.vectors
        assert all(delta.rank(matrix) == 2 * ADAPTER_RANK for matrix in delta.terms)


@pytest.mark.slow
def test_fused_is_better_than_every_expert(family: str, tmp_path: Path) -> None:
    """In the mean over their domains, in each of which the expert of that domain is ahead of the others."""
    preset = FAMILIES[family].preset("tiny-shared")
    assert preset.router is not None
    bundle = export_checkpoints(
        tmp_path / "bundle", Shape(family), preset.router, dict(preset.experts), ("fp32",), max_seq_len=128, shared_base=True
    )
    with FusionRuntime.load(bundle, "fp32", "cpu") as rt:

        def accuracy(domain: str, **options: Any) -> float:
            samples = draw_many(domain, "test", PROMPTS, seed=0)
            return float(np.mean([rt.generate(sample.prompt, 64, **options).text == sample.answer for sample in samples]))

        fused = {domain: accuracy(domain) for domain in DOMAINS}
        alone = {name: {domain: accuracy(domain, expert=name, lam=0.0) for domain in DOMAINS} for name in DOMAINS}
        assert rt.generate("12+30=").text == "42"
    for domain in DOMAINS:
        assert alone[domain][domain] == max(alone[name][domain] for name in DOMAINS), alone
    assert all(np.mean([*fused.values()]) > np.mean([*own.values()]) + 0.03 for own in alone.values()), (fused, alone)
