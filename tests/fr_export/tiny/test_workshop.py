"""The recipe of the shipped systems at a thousandth of its length: every part is made, once, and exports."""

import json
import shutil
from pathlib import Path

import pytest

from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.tasks.domains import DOMAINS
from fusionroute.fr_export.tiny.architectures import ARCHITECTURES
from fusionroute.fr_export.tiny.corpus import write_preferences, write_sft
from fusionroute.fr_export.tiny.ship import name_base
from fusionroute.fr_export.tiny.workshop import EVEN_MIX, Budget, Workshop
from fusionroute.runtime.manifest import Manifest
from tests.support.exporting import export_checkpoints
from tests.support.sparing import sparing
from tests.support.systems import Shape


@pytest.mark.parametrize("name", sparing(ARCHITECTURES, ("llama3",)))
def test_every_part_is_made_once_and_fits_together(name: str, tmp_path: Path) -> None:
    workshop = Workshop(ARCHITECTURES[name], tmp_path, width=32, budget=Budget().scaled(0.002))
    router = workshop.router(seed=0)
    system = System.open(FAMILIES[name], str(router), workshop.expert_folders)
    assert system.head.weight.shape == (3, 32)
    assert {path.name for path in (tmp_path / "experts").iterdir()} == set(DOMAINS)
    after_sft = System.open(FAMILIES[name], str(router / "stages" / "sft"), workshop.expert_folders)
    assert after_sft.router.config.hidden_size == 32
    direct = workshop.direct(seed=0)
    assert not (direct / "routing_head.safetensors").exists()

    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    workshop.router(seed=0), workshop.direct(seed=0)
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_adapters_of_one_base_share_it_wherever_they_are_moved_to(tmp_path: Path) -> None:
    """Experts and router as adapters: exported with one base, after a move that only relative paths survive."""
    workshop = Workshop(ARCHITECTURES["gemma2"], tmp_path / "work", width=32, budget=Budget().scaled(0.002), lora_rank=4)
    router = workshop.router(seed=0)
    shipped = tmp_path / "shipped"
    for name, folder in {
        "base": workshop.base(),
        "router": router,
        **{f"experts/{each}": workshop.expert(each) for each in DOMAINS},
    }.items():
        shutil.copytree(folder, shipped / name)
    for config in shipped.rglob("adapter_config.json"):
        name_base(config, shipped / "base")
    shutil.rmtree(tmp_path / "work")
    moved = shipped.rename(tmp_path / "moved")
    experts = {name: str(moved / "experts" / name) for name in DOMAINS}
    bundle = export_checkpoints(tmp_path / "bundle", Shape("gemma2"), str(moved / "router"), experts, ("fp32",), shared_base=True)
    pair = Manifest.read(bundle).variants[0].pair
    assert pair is not None and list(pair.factors) == list(DOMAINS)


def test_training_files_are_seeded(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_sft(tmp_path / f"sft-{name}", EVEN_MIX, 200, seed)
        write_preferences(tmp_path / f"preferences-{name}", EVEN_MIX, 50, seed)
    for kind in ("sft", "preferences"):
        a, b, c = ((tmp_path / f"{kind}-{name}").read_text() for name in "abc")
        assert a == b != c
    rows = [json.loads(line) for line in (tmp_path / "sft-a").read_text().splitlines()]
    assert 0.7 < sum("completion" in row for row in rows) / len(rows) < 0.9
    assert any(len(row["messages"]) > 2 for row in rows if "messages" in row)
    pairs = [json.loads(line) for line in (tmp_path / "preferences-a").read_text().splitlines()]
    assert all(pair["chosen"] != pair["rejected"] for pair in pairs)
