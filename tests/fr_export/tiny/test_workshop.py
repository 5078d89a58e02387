"""The recipe of the shipped systems at a thousandth of its length: every part is made, once, and exports."""

import json
from pathlib import Path

import pytest

from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.tasks.domains import DOMAINS
from fusionroute.fr_export.tiny.architectures import ARCHITECTURES
from fusionroute.fr_export.tiny.corpus import write_preferences, write_sft
from fusionroute.fr_export.tiny.workshop import EVEN_MIX, Budget, Workshop


@pytest.mark.parametrize("name", ARCHITECTURES)
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
