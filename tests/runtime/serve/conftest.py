"""A server of the first bundle in fp32, for all tests of a module."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fusionroute.runtime import FusionRuntime

if TYPE_CHECKING:
    from tests.support.server import Served

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "llguidance", "httpx")
collect_ignore_glob = [] if all(map(find_spec, NEEDED)) else ["test_*.py"]


@pytest.fixture(scope="module")
def server(bundles: list[Path]) -> Iterator["Served"]:
    from tests.support.server import served

    with served(FusionRuntime.load(bundles[0], precision="fp32", prefix_cache=2), sessions=2, queue=40, body_bytes=1 << 16) as running:
        yield running


@pytest.fixture(scope="module")
def rt(bundles: list[Path]) -> Iterator[FusionRuntime]:
    """Another runtime, which says what the server should answer."""
    with FusionRuntime.load(bundles[0], precision="fp32") as runtime:
        yield runtime
