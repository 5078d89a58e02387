"""Bundles with other contents than the exporter gave them. Needs no torch."""

import shutil
from pathlib import Path

from fusionroute.runtime.manifest import Manifest


def copy_with_ends(bundle: Path, copy: Path, ids: list[int]) -> Path:
    """Copy a bundle to a new folder, with these end-of-sequence tokens in its manifest; returns the folder."""
    shutil.copytree(bundle, copy)
    Manifest.read(copy).model_copy(update={"eos_token_ids": ids}).write(copy)
    return copy
