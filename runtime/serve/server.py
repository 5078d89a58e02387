"""Listening, and an end that loses no answer: SIGTERM lets requests finish for a while, then cancels them."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import Sequence

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from fusionroute.runtime.engine import FusionRuntime
from fusionroute.runtime.errors import UnavailableError, reason
from fusionroute.runtime.serve.app import Server, create_app
from fusionroute.runtime.serve.settings import Settings

KEEP_ALIVE_SECONDS = 65  # longer than clients keep idle connections, so that none sends into one that is being closed
GRACE_SECONDS = 5.0  # for answers that were cancelled to be sent


class Connection(H11Protocol):
    """uvicorn's, forgotten when it is lost: after a reset its timer would hold it, and its last request, for KEEP_ALIVE_SECONDS."""

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        super().connection_lost(exc)
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()


class DrainingServer(uvicorn.Server):
    """uvicorn's server, whose end is told to the jobs."""

    def __init__(self, app: FastAPI, settings: Settings):
        config = uvicorn.Config(
            app, http=Connection, log_level="warning", access_log=False, server_header=False, lifespan="on", timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=int(settings.drain_seconds + GRACE_SECONDS) + 1,
        )  # fmt: skip
        super().__init__(config)
        self._server: Server = app.state.server

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new requests, wait for those that run, and cancel what is left."""
        self._server.admission.draining = True
        asyncio.get_running_loop().call_later(self._server.settings.drain_seconds, self._server.jobs.cancel_all)
        await super().shutdown(sockets)


def serve(runtimes: Sequence[FusionRuntime], settings: Settings, listening: socket.socket) -> None:
    """Serve a bundle, in one precision or several, at a bound socket until a signal; then close the runtimes."""
    app = create_app(runtimes[0], settings, runtimes[1:])
    log = logging.getLogger("fusionroute.serve")
    log.setLevel(logging.INFO)
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.propagate = False
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of each write to a client that has left
    listening.listen()  # before anybody is told: who comes now waits until the app has started
    print(f"{settings.model} is served at http://{address(listening)}/v1", file=sys.stderr, flush=True)
    DrainingServer(app, settings).run([listening])


def bound(settings: Settings) -> socket.socket:
    """A socket at the address. Raises UnavailableError where it cannot be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((settings.host, settings.port))
    except OSError as error:
        listening.close()
        raise UnavailableError(
            f"{settings.host} port {settings.port} cannot be listened at ({reason(error)}): choose another with --host and --port."
        ) from error
    return listening


def address(listening: socket.socket) -> str:
    """Host and port, which the system chose where port 0 was asked for."""
    host, port = listening.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
