"""The folder of a trained router after a run that was killed while it replaced an older one."""

from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest

from fusionroute.fr_export.training.folder import TRAINING_FILE, RouterStaging
from fusionroute.fr_export.training.recipe import Stage
from fusionroute.fr_export.training.train import train
from fusionroute.runtime.errors import InputError
from tests.fr_export.training.conftest import Toy

DEAD = 2**22 + 1  # beyond the largest process id


def router(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / TRAINING_FILE).write_text(text)


@pytest.mark.parametrize("force", [False, True])
def test_the_old_router_goes_once_the_new_one_stands(tmp_path: Path, force: bool) -> None:
    out = tmp_path / "router"
    router(out, "new")
    router(tmp_path / f".router.replaced-{DEAD}", "old")
    if force:
        RouterStaging(out, force).prepare()
    else:
        with pytest.raises(InputError, match="add --force"):
            RouterStaging(out, force).prepare()
    assert [path.name for path in tmp_path.iterdir()] == ["router"] and (out / TRAINING_FILE).read_text() == "new"


def test_the_old_router_comes_back_where_there_is_no_new_one(tmp_path: Path) -> None:
    out = tmp_path / "router"
    router(tmp_path / f".router.replaced-{DEAD}", "old")
    with pytest.raises(InputError, match="add --force"):
        RouterStaging(out, False).prepare()
    assert [path.name for path in tmp_path.iterdir()] == ["router"] and (out / TRAINING_FILE).read_text() == "old"


def test_the_old_router_is_kept_where_other_files_took_its_place(tmp_path: Path) -> None:
    out = tmp_path / "router"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    router(tmp_path / f".router.replaced-{DEAD}", "old")
    with pytest.raises(InputError, match="is no router that was trained here"):
        RouterStaging(out, True).prepare()
    assert (tmp_path / f".router.replaced-{DEAD}" / TRAINING_FILE).read_text() == "old"


def test_a_run_recovers_before_it_trains(toy: Toy, tmp_path: Path) -> None:
    """An older router that comes back needs --force: the user hears of it at once, not after hours."""
    router(tmp_path / f".out.replaced-{DEAD}", "old")
    with (
        patch("fusionroute.fr_export.training.train.expert_scores", side_effect=AssertionError("too late")),
        pytest.raises(InputError, match="add --force to replace it"),
    ):
        train(toy.request(tmp_path / "out", Stage("sft", max_steps=1)))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


class OtherRank:
    """Accelerate's state on a rank that does not write. `rank_0` is what rank 0 does before it reaches the barrier."""

    is_main_process, num_processes = False, 2

    def __init__(self, rank_0: Callable[[], None]) -> None:
        self._rank_0 = rank_0

    def wait_for_everyone(self) -> None:
        self._rank_0()


def test_only_the_writing_rank_recovers_and_the_others_check_after_it(toy: Toy, tmp_path: Path) -> None:
    leftover = tmp_path / f".out.replaced-{DEAD}"
    router(leftover, "old")

    arrived = False

    def rank_0() -> None:
        nonlocal arrived
        arrived = True
        assert leftover.is_dir() and not (tmp_path / "out").exists(), "another rank has renamed it"
        RouterStaging(tmp_path / "out", False).recover()

    with (
        patch("accelerate.PartialState", return_value=OtherRank(rank_0)),
        pytest.raises(InputError, match="add --force to replace it"),
    ):
        train(toy.request(tmp_path / "out", Stage("sft", max_steps=1)))
    assert arrived and [path.name for path in tmp_path.iterdir()] == ["out"]
