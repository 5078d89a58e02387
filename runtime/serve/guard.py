"""What every request passes first: the key, the host it was sent to, and the bounds of its body."""

from __future__ import annotations

import asyncio
import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fusionroute.runtime.serve.errors import ApiError, respond
from fusionroute.runtime.serve.playground import FILES
from fusionroute.runtime.serve.settings import Settings, is_loopback

OPEN = ("/health", *FILES)  # paths without a key; the playground asks for one
BODY_SECONDS = 30.0


class Guard:
    """An ASGI middleware. It reads a body whole before it passes it on, so that a slow sender holds no session."""

    def __init__(self, app: ASGIApp, settings: Settings):
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            self._check(scope["path"], scope["method"], headers)
            body = await self._body(headers, receive)
        except ApiError as error:
            await respond(error)(scope, receive, send)
            return
        if body is None:  # the client has left
            return
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        await self._app(scope, replay, send)

    def _check(self, path: str, method: str, headers: Headers) -> None:
        settings = self._settings
        if settings.api_key is None:
            # a page of another host could have its name resolve to this machine
            name = headers.get("host", "").rsplit(":", 1)[0] if not headers.get("host", "").endswith("]") else headers["host"]
            if settings.loopback and not settings.insecure and not is_loopback(name):
                raise ApiError(403, "The request names another host: call 127.0.0.1 or localhost, or start the server with a key.")
            return
        if path in OPEN or method == "OPTIONS":
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), settings.api_key.encode()):
            raise ApiError(401, "The API key is missing or wrong: send it as 'Authorization: Bearer KEY'.", "invalid_api_key")

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        most = self._settings.body_bytes
        too_large = ApiError(413, f"The request has more than {most} bytes: send a shorter one.")
        length = headers.get("content-length", "0")
        if length.isdecimal() and (len(length) > 18 or int(length) > most):
            raise too_large
        body = bytearray()
        while True:
            try:
                message = await asyncio.wait_for(receive(), BODY_SECONDS)
            except asyncio.TimeoutError as error:
                raise ApiError(408, f"The body of the request did not come within {BODY_SECONDS:g} seconds.") from error
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > most:
                raise too_large
            if not message.get("more_body"):
                return bytes(body)
