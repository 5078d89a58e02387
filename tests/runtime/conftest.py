"""Bundles and runtimes for the runtime's tests, which run where torch is not installed too."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.backends.ort_cpu import OrtCache


@pytest.fixture(scope="session")
def shared(all_bundles: list[Path]) -> Path:
    """The system of adapters, with one base for all of them."""
    return all_bundles[2]


@pytest.fixture(scope="session")
def merged(all_bundles: list[Path]) -> Path:
    """The system of adapters as full models."""
    return all_bundles[3]


@pytest.fixture(scope="session")
def segments(all_bundles: list[Path]) -> Path:
    """A system of adapters with one base, whose experts may all read in one pass."""
    return all_bundles[4]


@pytest.fixture(params=["int8", "fp32"])
def rt(request: pytest.FixtureRequest, bundles: list[Path]) -> Iterator[FusionRuntime]:
    """The first bundle in both precisions; one test of the engine runs all bundles."""
    with FusionRuntime.load(bundles[0], precision=request.param) as runtime:
        yield runtime


@pytest.fixture
def router_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens the router reads on the CPU, pass by pass."""
    counts: list[int] = []
    forward = OrtCache.forward

    def noted(self: OrtCache, ids: Any, positions: Any) -> Any:
        if self._model.model.name == "router":
            counts.append(len(ids))
        return forward(self, ids, positions)

    monkeypatch.setattr(OrtCache, "forward", noted)
    return counts
