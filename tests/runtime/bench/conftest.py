"""For the tests of the benchmark: memory's bandwidth is known, and few short texts are measured."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from fusionroute.runtime.bench import bandwidth
from tests.support.commands import Command

CEILING = bandwidth.Bandwidth(20e9, 1 << 28)
FEW = ("--prompt-tokens", 9, "--new-tokens", 12, "--repeats", 3)


@pytest.fixture(autouse=True)
def known_bandwidth(request: pytest.FixtureRequest) -> Iterator[None]:
    """Reading a large buffer for every test would take longer than the tests."""
    with patch.object(bandwidth, "of_host", return_value=CEILING):
        yield


def measured(command: Command, bundle: Path, *options: object) -> dict[str, Any]:
    ended = command("bench", bundle, *FEW, "--json", *options)
    assert ended.status == 0, ended.err
    result: dict[str, Any] = json.loads(ended.out)
    return result
