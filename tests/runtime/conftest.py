"""Bundles for the runtime's tests, which run where torch is not installed too."""

import os
import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Copies of the folders in FUSIONROUTE_BUNDLES (with colons between); else two small systems, exported here."""
    root = tmp_path_factory.mktemp("bundles")
    named = [Path(name) for name in os.environ.get("FUSIONROUTE_BUNDLES", "").split(":") if name]
    if named:
        return [Path(shutil.copytree(path, root / f"{number}-{path.name}")) for number, path in enumerate(named)]
    from tests.support.exporting import export_runtime_bundles

    return export_runtime_bundles(root)
