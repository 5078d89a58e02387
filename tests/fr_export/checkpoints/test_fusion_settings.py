from pathlib import Path

import pytest

from fusionroute.fr_export.checkpoints.fusion_settings import FILE, FusionSettings
from fusionroute.runtime.errors import InputError

TUNED = FusionSettings(lam=0.3, lam_curve=[(0.0, 0.5), (0.3, 0.9), (1.0, 0.2)])


def test_a_router_without_the_file_has_the_default(tmp_path: Path) -> None:
    assert FusionSettings.read(tmp_path) == FusionSettings(fusion="weighted", lam=0.5, lam_curve=None)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    TUNED.write(tmp_path)
    assert FusionSettings.read(tmp_path) == TUNED


def test_the_caller_overrides_and_the_curve_goes_with_its_lambda() -> None:
    assert TUNED.replaced(None, None) == TUNED
    assert TUNED.replaced(None, 0.7) == FusionSettings(lam=0.7)
    assert TUNED.replaced("additive", None) == FusionSettings(fusion="additive", lam=0.3)


@pytest.mark.parametrize("text", ["", "[]", '{"lam": 2}', '{"fusion": "product"}', '{"lambda": 0.5}', "\xff"])
def test_a_broken_file_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"fusion\.json cannot be read .*: mend it, or delete it"):
        FusionSettings.read(tmp_path)


@pytest.mark.parametrize(("fusion", "lam"), [("product", None), (None, 1.5), (None, float("nan"))])
def test_wrong_values_are_refused(fusion: str | None, lam: float | None) -> None:
    with pytest.raises(InputError):
        TUNED.replaced(fusion, lam)
