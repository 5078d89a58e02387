"""Bundles and runtimes for the runtime's tests, which run where torch is not installed too."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusionroute.runtime import FusionRuntime


@pytest.fixture(scope="session")
def all_bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Copies of the folders in FUSIONROUTE_BUNDLES (with colons between); else small systems, exported here."""
    root = tmp_path_factory.mktemp("bundles")
    named = [Path(name) for name in os.environ.get("FUSIONROUTE_BUNDLES", "").split(":") if name]
    if named:
        return [Path(shutil.copytree(path, root / f"{number}-{path.name}")) for number, path in enumerate(named)]
    from tests.support.exporting import export_runtime_bundles

    return export_runtime_bundles(root)


@pytest.fixture(scope="session")
def bundles(all_bundles: list[Path]) -> list[Path]:
    """Two systems of full models, and one of adapters with one base."""
    return all_bundles[:3]


@pytest.fixture(scope="session")
def shared(all_bundles: list[Path]) -> Path:
    """The system of adapters, with one base for all of them."""
    return all_bundles[2]


@pytest.fixture(scope="session")
def merged(all_bundles: list[Path]) -> Path:
    """The system of adapters as full models."""
    return all_bundles[3]


@pytest.fixture(params=["int8", "fp32"])
def rt(request: pytest.FixtureRequest, bundles: list[Path]) -> Iterator[FusionRuntime]:
    """The first bundle in both precisions; one test of the engine runs all bundles."""
    with FusionRuntime.load(bundles[0], precision=request.param) as runtime:
        yield runtime


@pytest.fixture
def bundle(bundles: list[Path], tmp_path: Path) -> Path:
    """A copy to tamper with."""
    return Path(shutil.copytree(bundles[0], tmp_path / "bundle"))
