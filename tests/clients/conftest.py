"""The shipped Gemma-2 system behind the README's command, and a runtime that says what it should answer."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fusionroute.runtime import FusionRuntime
from tests.support.exporting import export_shipped
from tests.support.server import MODEL
from tests.support.started import Started, started


@pytest.fixture(scope="session")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_shipped(tmp_path_factory.mktemp("shipped") / "gemma2", "gemma2", ("fp32",))


@pytest.fixture(scope="session")
def server(shipped: Path) -> Iterator[Started]:
    with started(shipped, "--model", MODEL, "--sessions", "2") as running:
        yield running


@pytest.fixture(scope="session")
def rt(shipped: Path) -> Iterator[FusionRuntime]:
    with FusionRuntime.load(shipped) as runtime:
        yield runtime
