"""What helps where ONNX Runtime cannot make a session: the advice follows the cause."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fusionroute.runtime import BundleError, FusionError, FusionRuntime, UnavailableError
from fusionroute.runtime.backends import ort

CAUSES: dict[str, tuple[Exception, type[FusionError], str]] = {
    "memory": (RuntimeError("std::bad_alloc"), UnavailableError, "(std::bad_alloc); free memory, or load a smaller precision."),
    "python's memory": (MemoryError(), UnavailableError, "(MemoryError); free memory, or load a smaller precision."),
    "a buffer": (
        RuntimeError("Failed to allocate memory for requested buffer of size 8"),
        UnavailableError,
        "(Failed to allocate memory for requested buffer of size 8); free memory, or load a smaller precision.",
    ),
    "a newer format": (
        RuntimeError("Unsupported model IR version: 99, max supported IR version: 11"),
        UnavailableError,
        "; update ONNX Runtime, or export the bundle with the release that reads it.",
    ),
    "another operator": (
        RuntimeError("com.microsoft:New(-1) is not a registered function/op"),
        UnavailableError,
        "; update ONNX Runtime, or export the bundle with the release that reads it.",
    ),
    "an attribute that it does not know": (
        RuntimeError("Unrecognized attribute: k_quant_type for operator GroupQueryAttention"),
        UnavailableError,
        "; update ONNX Runtime, or export the bundle with the release that reads it.",
    ),
    "more inputs than it knows": (
        RuntimeError("Error Node(n) with schema(com.microsoft::GroupQueryAttention:1) has input size 14 not in range [min=7, max=12]."),
        UnavailableError,
        "; update ONNX Runtime, or export the bundle with the release that reads it.",
    ),
    "a broken graph": (RuntimeError("Protobuf parsing failed."), BundleError, "(Protobuf parsing failed.); export the bundle again."),
}


@pytest.mark.parametrize("name", CAUSES)
def test_the_advice_follows_the_cause(bundles: list[Path], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cause, kind, words = CAUSES[name]

    def fails(*_: Any, **__: Any) -> None:
        raise cause

    monkeypatch.setattr(ort, "open_session", fails)
    with pytest.raises(kind) as caught:
        FusionRuntime.load(bundles[0], "fp32", "cpu")
    assert type(caught.value) is kind
    assert "cannot load router from " in str(caught.value) and str(caught.value).endswith(words)


@pytest.mark.parametrize(
    ("release", "refused"), [("1.22.1", True), ("1.9.0", True), ("1.23.0", False), ("1.33.0.dev1", False), ("2.0", False)]
)
def test_an_old_release_is_told_to_be_updated(monkeypatch: pytest.MonkeyPatch, release: str, refused: bool) -> None:
    monkeypatch.setattr(ort, "import_module", lambda _: SimpleNamespace(__version__=release))
    if not refused:
        assert ort.package("cpu").__version__ == release
        return
    with pytest.raises(UnavailableError) as caught:
        ort.package("cpu")
    assert str(caught.value) == (
        f"ONNX Runtime {release} is too old: this backend needs 1.23 or a later one; update it (pip install --upgrade 'fusionroute[cpu]')."
    )
