"""A server in this process, at a free port, and a client's calls to it."""

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.serve.app import Server, create_app
from fusionroute.runtime.serve.server import DrainingServer, address, bound
from fusionroute.runtime.serve.settings import Settings

MODEL = "tiny"


class Served:
    """A running server. `url` ends with the port. `key`: what clients send."""

    def __init__(self, runtime: FusionRuntime, settings: Settings, more: Sequence[FusionRuntime] = ()):
        self.app = create_app(runtime, settings, more)
        self.server: Server = self.app.state.server
        listening = bound(replace(settings, port=0))
        self.url, self.key = f"http://{address(listening)}", settings.api_key or "none"
        self.uvicorn = DrainingServer(self.app, settings)
        self.thread = threading.Thread(target=self.uvicorn.run, args=([listening],))
        self.thread.start()
        wait_until(lambda: self.uvicorn.started)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **options)

    def complete(self, prompt: Any = "12+30=", **fields: Any) -> httpx.Response:
        return self.post("/v1/completions", {"model": MODEL, "prompt": prompt, **fields})

    def metric(self, name: str) -> float:
        """The sum of a figure over its labels."""
        lines = httpx.get(self.url + "/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith((f"fusionroute_{name} ", f"fusionroute_{name}{{")))

    def stop(self) -> None:
        """As SIGTERM does."""
        self.uvicorn.should_exit = True

    @property
    def idle(self) -> bool:
        return self.server.admission.running == self.server.admission.waiting == 0


@contextmanager
def served(runtime: FusionRuntime, *more: FusionRuntime, **settings: Any) -> Iterator[Served]:
    """Serve runtimes of one bundle, which are closed at the end."""
    running = Served(runtime, Settings(**{"model": MODEL} | settings), more)
    try:
        yield running
    finally:
        running.stop()
        running.thread.join(30)
        assert not running.thread.is_alive()


def wait_until(done: Any, seconds: float = 20.0) -> None:
    """Wait for something that another thread does."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.005)


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The objects of server-sent events."""
    for line in lines:
        if line and line != "data: [DONE]":
            assert line.startswith("data: ")
            yield json.loads(line.removeprefix("data: "))
