"""Errors as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from fusionroute.runtime.errors import ClosedError, FusionError, InputError, UnavailableError

KINDS = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that ends with a status and one sentence. `retry_after`: seconds."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after

    @property
    def content(self) -> dict[str, Any]:
        """The object that clients get."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Beside those of every answer, as HTTP asks for."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def of_runtime(error: FusionError) -> ApiError:
    """What an error of the runtime is for a client: its own fault, or the server's."""
    if isinstance(error, (InputError, UnavailableError)):
        return ApiError(400, str(error))
    return ApiError(503 if isinstance(error, ClosedError) else 500, str(error))


def of_validation(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    unknown = first["type"] == "extra_forbidden"
    message = f"Unknown argument: {place}." if unknown else f"{place or 'The request'}: {first['msg']}."
    return ApiError(400, message, "unknown_parameter" if unknown else "invalid_value", place or None)


def respond(error: ApiError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The answer. headers: more than the error's own."""
    return JSONResponse(error.content, error.status, {**error.headers, **(headers or {})})


def add_handlers(app: FastAPI) -> None:
    """Answer every error of a request as above. What nobody foresaw says nothing about the server's inside."""

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> JSONResponse:
        return respond(error)

    @app.exception_handler(FusionError)
    async def runtime_error(_: Request, error: FusionError) -> JSONResponse:
        return respond(of_runtime(error))

    @app.exception_handler(RequestValidationError)
    async def wrong_body(_: Request, error: RequestValidationError) -> JSONResponse:
        return respond(of_validation(error))

    @app.exception_handler(HTTPException)
    async def wrong_path(_: Request, error: HTTPException) -> JSONResponse:
        return respond(ApiError(error.status_code, f"{str(error.detail).rstrip('.')}."), error.headers)  # which methods there are

    @app.exception_handler(Exception)
    async def unforeseen(_: Request, error: Exception) -> JSONResponse:
        return respond(ApiError(500, "The server failed unexpectedly: its log says more."))
