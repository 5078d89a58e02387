"""Bundles with other contents than the exporter gave them, and the sentence that refuses one. Needs no torch."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusionroute.runtime import BundleError, FusionRuntime
from fusionroute.runtime.manifest import Manifest

Change = Callable[[dict[str, Any]], object]


def copy_with_ends(bundle: Path, copy: Path, ids: list[int]) -> Path:
    """Copy a bundle to a new folder, with these end-of-sequence tokens in its manifest; returns the folder."""
    shutil.copytree(bundle, copy)
    Manifest.read(copy).model_copy(update={"eos_token_ids": ids}).write(copy)
    return copy


def edit(bundle: Path, change: Change) -> None:
    """Change what the manifest says."""
    content = json.loads((bundle / "manifest.json").read_text())
    change(content)
    (bundle / "manifest.json").write_text(json.dumps(content))


def as_format(number: int) -> Change:
    """Let a manifest be of a format without BLAKE3s."""

    def change(content: dict[str, Any]) -> None:
        content["format"] = number
        for entry in content["files"].values():
            entry.pop("blake3", None)

    return change


def rehash(bundle: Path, name: str) -> None:
    """Let the manifest say what a file holds now: only its size and hash."""
    data = (bundle / name).read_bytes()
    edit(bundle, lambda content: content["files"].update({name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}}))


def refusal(bundle: Path) -> str:
    """The sentence with which loading ends; one line, which names the bundle."""
    with pytest.raises(BundleError) as caught:
        FusionRuntime.load(bundle)
    sentence = str(caught.value)
    assert "\n" not in sentence and str(bundle) in sentence
    assert sentence.endswith(".")
    return sentence
