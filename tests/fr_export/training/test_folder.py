"""The folder of a trained router after a run that was killed while it replaced an older one."""

from pathlib import Path

import pytest

from fusionroute.fr_export.training.folder import TRAINING_FILE, RouterStaging
from fusionroute.runtime.errors import InputError

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
