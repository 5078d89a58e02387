"""One line of JSON for each request that is over: figures, and nothing of what was asked or answered."""

from __future__ import annotations

import json
import logging
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fusionroute.runtime.serve.metrics import Metrics

LOG = logging.getLogger("fusionroute.serve")
KNOWN = ("/health", "/metrics", "/tokenize", "/v1/models", "/v1/completions", "/v1/chat/completions")


class RequestLog:
    """An ASGI middleware. It gives each request an id, which the client gets as X-Request-Id."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["arrival"], number, status = time.perf_counter(), uuid.uuid4().hex, [0]

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", number.encode())]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            status[0] = status[0] or 500  # nobody foresaw it; whoever stands before this answers
            path = scope["path"] if scope["path"] in KNOWN else "other"
            self._metrics.requests.labels(path, str(status[0])).inc()
            line = {"request": number, "method": scope["method"], "path": path, "status": status[0]}
            line["seconds"] = round(time.perf_counter() - state["arrival"], 4)
            if (job := state.get("job")) is not None:
                line |= {"prompt_tokens": job.prompt_tokens, "completion_tokens": job.completion_tokens, "finish": job.finish}
                line["first_token_seconds"] = job.first_token and round(job.first_token, 4)
            LOG.info(json.dumps(line))
