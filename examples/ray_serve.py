"""Serve a bundle on several machines, or as several processes of one, with Ray Serve.

python examples/ray_serve.py dist/gemma2 2

A front reads each request and sends it to a replica, one that has read the same beginning if it is not too busy. A
replica is the app of `fusionroute serve` with a runtime of its own, and its own sessions and queue. If it dies, the front
sends its requests to another one, as long as no byte of the answer has gone out; a stream that was begun ends with an
error. Ray starts a new replica, and one too whose health check fails. SIGTERM and Ctrl-C let running requests end.
"""

import asyncio
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
try:
    from ray import serve
except ImportError:
    sys.exit("error: Ray is not installed: pip install 'fusionroute[ray]'.")
from ray.exceptions import RayActorError
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import LocalityMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Scope

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.serve.app import create_app
from fusionroute.runtime.serve.errors import ApiError, respond
from fusionroute.runtime.serve.prefix_affinity import PrefixAffinity, prompt_text
from fusionroute.runtime.serve.settings import Settings
from fusionroute.runtime.serve.streaming import sse

ATTEMPTS = 5  # replicas that a request is sent to, one after the other
DIED = "The replica that generated this answer died: send the request again."
SCOPE = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "client", "server")


class PrefixRouter(LocalityMixin, RequestRouter):
    """Tells Ray which replica should have a request."""

    def initialize_state(self, **options: int) -> None:
        """Ray calls it with the `request_router_kwargs` of `build`."""
        self._affinity = PrefixAffinity(**options)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Replicas in the order in which Ray shall try them."""
        allowed = self.apply_locality_routing(pending_request)
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas if replica.replica_id in allowed}
        loads = {name: self.replica_queue_len_cache.get(replica.replica_id) or 0 for name, replica in replicas.items()}
        return [[replicas[name]] for name in self._affinity.order(text_of(pending_request), loads)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """A replica has a request."""
        self._affinity.note(replica_id.unique_id, text_of(pending_request))

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """A replica is gone."""
        super().on_replica_actor_died(replica_id)
        self._affinity.forget(replica_id.unique_id)


def text_of(request: PendingRequest | None) -> str:
    """The prompt in the arguments of `Replica.__call__`."""
    return prompt_text(request.args[1]) if request else ""


class Replica:
    """The app, and a runtime of its own."""

    def __init__(self, bundle: str, settings: Settings, options: dict[str, Any]):
        runtime = FusionRuntime.load(bundle, prefix_cache=settings.sessions, **options)
        self._app = create_app(runtime, settings)
        self._name = serve.get_replica_context().replica_id.unique_id.encode()

    async def __call__(self, scope: Scope, body: bytes) -> AsyncIterator[Message]:
        """The app's ASGI messages for one request. The app is told that the client left where nobody reads them on."""
        messages, left = asyncio.Queue[Message | None](), asyncio.Event()
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if not pending:
                await left.wait()
            return pending.pop() if pending else {"type": "http.disconnect"}

        async def answer() -> None:
            try:
                await self._app(scope, receive, messages.put)
            finally:
                messages.put_nowait(None)

        task = asyncio.create_task(answer())
        try:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (b"x-replica", self._name)]
                yield message
        finally:
            left.set()
            await task

    async def check_health(self) -> None:
        """Ray replaces the replica where this fails, or takes too long."""
        scope = {"type": "http", "method": "GET", "path": "/health", "query_string": b"", "headers": [(b"host", b"localhost")]}
        async for message in self(scope, b""):
            if message.get("status", 200) != 200:
                raise RuntimeError("the app says that it is not healthy")

    def __del__(self) -> None:
        server = self._app.state.server
        server.jobs.close()
        server.runtime.close()


class Front:
    """Sends requests to replicas, and again where one died."""

    def __init__(self, replicas: DeploymentHandle, body_bytes: int):
        self._replicas, self._body_bytes = replicas.options(stream=True), body_bytes

    async def __call__(self, request: Request) -> Response:
        """The answer of a replica. `X-Attempt` is 1, or more where replicas died before."""
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > self._body_bytes:
                break  # the app refuses it
        scope = {name: request.scope[name] for name in SCOPE if name in request.scope}
        for attempt in range(1, ATTEMPTS + 1):
            messages = self._replicas.remote(scope, bytes(body))
            try:
                start, first = await anext(messages), await anext(messages)
            except RayActorError:
                continue
            answer = StreamingResponse(rest(first, messages), start["status"])
            answer.raw_headers = [*start["headers"], (b"x-attempt", b"%d" % attempt)]
            return answer
        return respond(ApiError(503, f"{ATTEMPTS} replicas died with this request.", retry_after=1))


async def rest(first: Message, messages: AsyncIterator[Message]) -> AsyncIterator[bytes]:
    """The body of an answer. Only streams have a second piece, so only they can end in the middle."""
    yield first["body"]
    try:
        async for message in messages:
            yield message["body"]
    except RayActorError:
        yield sse(ApiError(503, DIED).content)


def build(bundle: Path, settings: Settings, replicas: int, actor: dict[str, Any] | None = None, **options: Any) -> serve.Application:
    """What `serve.run` runs. actor: what of a machine one replica needs, in Ray's words; options: of `FusionRuntime.load`."""
    router = RequestRouterConfig(
        request_router_class=PrefixRouter, request_router_kwargs={"texts": 2 * settings.sessions, "slack": settings.sessions}
    )
    replica = serve.deployment(
        Replica, name="Replica", num_replicas=replicas, ray_actor_options=actor or {}, request_router_config=router,
        max_ongoing_requests=1 << 16,  # the app bounds them
        health_check_period_s=1, health_check_timeout_s=30, graceful_shutdown_wait_loop_s=0.1, graceful_shutdown_timeout_s=settings.drain_seconds,
    )  # fmt: skip
    front = serve.deployment(
        Front, name="Front", max_ongoing_requests=1 << 16, ray_actor_options={"num_cpus": 0}, graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=settings.drain_seconds,
    )  # fmt: skip
    return front.bind(replica.bind(str(bundle.resolve()), settings, options), settings.body_bytes)


def main(bundle: Path, replicas: int, port: int = 8000) -> None:
    """Serve at http://127.0.0.1:8000 until a signal."""
    settings = Settings(bundle.resolve().name, port=port, api_key=os.environ.get("FUSIONROUTE_API_KEY"), sessions=4)
    serve.start(http_options={"host": settings.host, "port": settings.port})
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())  # in place of Ray's own, which ends the process at once
    serve.run(build(bundle, settings, replicas), name="fusionroute")
    stopped.wait()
    serve.delete("fusionroute")  # the proxy stays until requests that run have ended
    serve.shutdown()


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4) or not all(number.isdecimal() for number in sys.argv[2:]):
        sys.exit("usage: python examples/ray_serve.py BUNDLE REPLICAS [PORT]")
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
