"""With `exact=True`, greedy output with drafts equals output without, in every precision."""

from pathlib import Path

import pytest

from tests.support.exporting import ALL, export_system
from tests.support.speculation import draft_always, same
from tests.support.systems import Shape


def compare(folder: Path, monkeypatch: pytest.MonkeyPatch, family: str, precisions: tuple[str, ...], prompts: int) -> None:
    bundle, _ = export_system(folder, Shape(family, layers=2, experts=3), precisions)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    draft_always(monkeypatch)
    for precision in precisions:
        assert same(bundle, precision, prompts, exact=True) > 4 * prompts


def test_exact_output_does_not_depend_on_drafts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(tmp_path, monkeypatch, "gemma2", ("int8", "int4"), 15)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2", "llama3"])
def test_exact_output_does_not_depend_on_drafts_in_any_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    compare(tmp_path, monkeypatch, family, ALL, 500)
