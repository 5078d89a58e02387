"""Bundles for the runtime's tests, which run where torch is not installed too."""

import os
import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Copies of the bundles that FUSIONROUTE_BUNDLES names (folders with colons between); else two small systems, exported here."""
    root = tmp_path_factory.mktemp("bundles")
    named = [Path(name) for name in os.environ.get("FUSIONROUTE_BUNDLES", "").split(":") if name]
    if named:
        return [Path(shutil.copytree(path, root / f"{number}-{path.name}")) for number, path in enumerate(named)]
    from tests.exporting import export_system
    from tests.systems import Shape

    shapes = [Shape(family, layers=1, experts=2, tokenizer=True) for family in ("llama3", "gemma2")]
    return [export_system(root / shape.family, shape, ("fp32", "int8"))[0] for shape in shapes]
