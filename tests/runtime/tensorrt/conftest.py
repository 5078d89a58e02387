"""For the tests on the simulated device."""

from pathlib import Path

import pytest

from tests.support.simulated.bundles import write_bundle


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of hand-written graphs: a router and three experts."""
    return write_bundle(tmp_path_factory.mktemp("engines") / "bundle")
