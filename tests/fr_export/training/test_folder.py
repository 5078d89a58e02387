"""The folder of a trained router: what a killed run left there is recovered or removed when the next run starts."""

import shutil
from pathlib import Path
from unittest.mock import patch

import pytest

from fusionroute.fr_export.training.folder import TRAINING_FILE, RouterStaging
from fusionroute.fr_export.training.recipe import Stage
from fusionroute.fr_export.training.train import train
from fusionroute.runtime.errors import InputError
from tests.fr_export.training.conftest import Toy

DEAD = 4194304  # no process has this number: Linux counts to one less


def router(folder: Path, content: str) -> Path:
    """A folder that counts as a trained router."""
    folder.mkdir()
    (folder / TRAINING_FILE).write_text(content)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_old_router_that_was_replaced_already_is_removed(tmp_path: Path) -> None:
    router(tmp_path / "out", "new")
    router(tmp_path / f".out.replaced-{DEAD}", "old")
    RouterStaging(tmp_path / "out", force=False).recover()
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / TRAINING_FILE).read_text() == "new"


def test_an_old_router_that_was_not_replaced_yet_comes_back(tmp_path: Path) -> None:
    router(tmp_path / f".out.replaced-{DEAD}", "old")
    router(tmp_path / f".out.partial-{DEAD}", "unfinished")
    RouterStaging(tmp_path / "out", force=False).recover()
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / TRAINING_FILE).read_text() == "old"


def test_a_run_recovers_before_it_trains(toy: Toy, tmp_path: Path) -> None:
    """An older router that comes back needs --force: the user hears of it at once, not after hours."""
    router(tmp_path / f".out.replaced-{DEAD}", "old")
    with (
        patch("fusionroute.fr_export.training.train.expert_scores", side_effect=AssertionError("too late")),
        pytest.raises(InputError, match="add --force to replace it"),
    ):
        train(toy.request(tmp_path / "out", Stage("sft", max_steps=1)))
    assert names(tmp_path) == ["out"]


def test_a_folder_that_is_no_router_is_left_alone(tmp_path: Path) -> None:
    shutil.copytree(router(tmp_path / "out", "mine"), tmp_path / f".out.replaced-{DEAD}")
    (tmp_path / "out" / TRAINING_FILE).rename(tmp_path / "out" / "notes.txt")
    with pytest.raises(InputError, match="is not replaced"), RouterStaging(tmp_path / "out", force=True):
        pass
    assert names(tmp_path) == [f".out.replaced-{DEAD}", "out"]
    assert names(tmp_path / "out") == ["notes.txt"]
