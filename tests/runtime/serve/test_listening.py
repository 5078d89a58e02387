"""Who is told an address can connect to it."""

import socket

import pytest

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.serve.server import DrainingServer, bound, serve
from fusionroute.runtime.serve.settings import Settings


def test_clients_can_come_as_soon_as_the_address_is_told(
    rt: FusionRuntime, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """uvicorn listens only once the app has started."""
    told = []

    def run(_: DrainingServer, sockets: list[socket.socket]) -> None:
        with socket.create_connection(sockets[0].getsockname(), 5):
            told.append(capsys.readouterr().err)

    monkeypatch.setattr(DrainingServer, "run", run)
    settings = Settings("m", port=0)
    with bound(settings) as listening:
        serve([rt], settings, listening)
        assert told == [f"m is served at http://127.0.0.1:{listening.getsockname()[1]}/v1\n"]
