"""A whole system, and a copy of it to be damaged."""

import shutil
from pathlib import Path

import pytest

from tests.support.systems import Shape, make_system

SHAPE = Shape(heads=2, kv_heads=1, head_dim=16, hidden=32, layers=1, experts=2, tokenizer=True)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    make_system(folder, SHAPE)
    return folder


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    """Folders router, expert0 and expert1, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "system"))
