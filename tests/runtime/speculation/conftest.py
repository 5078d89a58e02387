"""A cache of costs of its own for every test, and drafting whether it pays or not."""

from pathlib import Path

import pytest

from tests.support.speculation import SHORT, draft_always


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(SHORT, 0.0)  # the models here are small


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    draft_always(monkeypatch)
