"""Which CUDA these tests run on."""

from collections.abc import Iterator
from ctypes import CDLL
from pathlib import Path

import pytest

from fusionroute.runtime.errors import UnavailableError
from fusionroute.runtime.tensorrt.device import Device
from tests.support.host_cuda.install import faults
from tests.support.simulated.bundles import CHUNK, add_engines, write_bundle


@pytest.fixture(scope="session")
def on_host(pytestconfig: pytest.Config) -> CDLL | None:
    """The library that stands for CUDA; None on a GPU."""
    plugin = pytestconfig.pluginmanager.get_plugin("tests.support.host_cuda.plugin")
    return None if plugin is None else plugin.LIBRARY


@pytest.fixture(autouse=True)
def no_luck(on_host: CDLL | None) -> Iterator[None]:
    """On the host, nothing may have been in use when it was freed."""
    yield
    if on_host is not None:
        assert not faults(on_host)


@pytest.fixture(scope="session")
def device(on_host: CDLL | None) -> Device:
    """The device, current in this thread."""
    try:
        device = Device()
    except UnavailableError as error:
        pytest.skip(str(error))
    device.enter()
    return device


@pytest.fixture(scope="session")
def folder(device: Device, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of hand-written graphs: a router and three experts. Its engines say that they are for this device too."""
    return add_engines(write_bundle(tmp_path_factory.mktemp("engines") / "bundle"), CHUNK, (89, device.sm))
