"""Bundles and runtimes for the runtime's tests, which run where torch is not installed too."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fusionroute.runtime import FusionRuntime


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
