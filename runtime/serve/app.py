"""The routes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.middleware.cors import CORSMiddleware

from fusionroute.runtime import __version__
from fusionroute.runtime.engine import FusionRuntime
from fusionroute.runtime.errors import InputError
from fusionroute.runtime.serve import tool_calls
from fusionroute.runtime.serve.admission import Admission
from fusionroute.runtime.serve.answers import Answer
from fusionroute.runtime.serve.errors import ApiError, add_handlers
from fusionroute.runtime.serve.guard import Guard
from fusionroute.runtime.serve.jobs import Jobs, Order
from fusionroute.runtime.serve.metrics import Metrics
from fusionroute.runtime.serve.playground import add_playground
from fusionroute.runtime.serve.replies import EVENTS, REFUSED, ChatCompletion, Completion, Health, Model, Models, Tokens
from fusionroute.runtime.serve.request_log import RequestLog
from fusionroute.runtime.serve.requests import ChatRequest, CompletionRequest, Generating, TokenizeRequest, Tool
from fusionroute.runtime.serve.settings import Settings
from fusionroute.runtime.serve.streaming import collected, streamed

T = TypeVar("T")
COMPLETION_TOKENS = 16  # without max_tokens, as with OpenAI
CLOSED_REQUEST = 499  # of nginx: the client has left


class Server:
    """What the routes share."""

    def __init__(self, runtime: FusionRuntime, settings: Settings, more: Sequence[FusionRuntime]):
        self.runtime, self.settings = runtime, settings
        self.runtimes = {each.precision: each for each in (runtime, *more)}
        self.admission = Admission(settings.sessions, settings.queue)
        self.metrics = Metrics(lambda: self.admission.running, lambda: self.admission.waiting)
        self.jobs = Jobs(self.admission, self.metrics, settings.seconds)

    def check_model(self, model: str | None) -> None:
        """Raise ApiError for a model that is not this one."""
        if model is not None and model != self.settings.model:
            message = f"The model {model[:80]!r} is not here: use {self.settings.model!r}."
            raise ApiError(404, message, "model_not_found", "model")

    def runtime_in(self, precision: str | None) -> FusionRuntime:
        """The runtime of a precision, by default the first. Raises InputError for one that is not loaded."""
        if precision is None:
            return self.runtime
        if precision not in self.runtimes:
            known = ", ".join(self.runtimes)
            raise InputError(f"The precision {precision[:80]!r} is not loaded: use {known}, or start the server with it in --precision.")
        return self.runtimes[precision]

    async def answer(self, request: Request, body: Generating, order: Order, answer: Answer, tools: list[Tool]) -> Response:
        """Generate, and answer in one piece or in a stream. The session is free within a token once the client leaves."""
        job = await unless_gone(request, self.jobs.start(order, request.state.arrival))
        if job is None:
            return Response(status_code=CLOSED_REQUEST)
        request.state.job = job
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            return StreamingResponse(
                streamed(job, answer, tools, usage), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
            )
        content = await unless_gone(request, collected(job, answer, tools))
        return Response(status_code=CLOSED_REQUEST) if content is None else JSONResponse(content)

    def encode_chat(self, messages: list[dict[str, Any]], **chat: Any) -> list[int]:
        """Token ids of a conversation. Raises InputError, UnavailableError."""
        given = {name: value for name, value in chat.items() if value is not None}
        return self.runtime.prompt_ids(messages, **given)


async def unless_gone(request: Request, work: Awaitable[T]) -> T | None:
    """What some work returns; None, and the work cancelled, where the client leaves before."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(until_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def until_gone(request: Request) -> None:
    """Wait until the client leaves. The body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def create_app(runtime: FusionRuntime, settings: Settings, more: Sequence[FusionRuntime] = ()) -> FastAPI:
    """The application: serve it with any ASGI server, in one process. It closes the runtimes when it ends.

    more: the same bundle in other precisions, for requests that name one.
    """
    server = Server(runtime, settings, more)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.get_running_loop().run_in_executor(None, server.jobs.close)
        for each in server.runtimes.values():
            each.close()

    pages: dict[str, Any] = {"docs_url": None, "redoc_url": None}  # they need a CDN
    app = FastAPI(title="fusionroute", version=__version__, lifespan=lifespan, responses=REFUSED, **pages)
    app.state.server = server
    add_handlers(app)
    add_information(app, server)
    add_generation(app, server)
    add_playground(app)
    app.add_middleware(Guard, settings=settings)
    if settings.cors:
        app.add_middleware(CORSMiddleware, allow_origins=list(settings.cors), allow_methods=["GET", "POST"], allow_headers=["*"])
    app.add_middleware(RequestLog, metrics=server.metrics)
    return app


def add_information(app: FastAPI, server: Server) -> None:
    """The routes that generate nothing."""
    runtime, settings = server.runtime, server.settings

    @app.get("/health", response_model=Health)
    async def health() -> JSONResponse:
        draining = server.admission.draining
        return JSONResponse({"status": "draining" if draining else "ok"}, 503 if draining else 200)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models", response_model=Models)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model()]}

    @app.get("/v1/models/{name}", response_model=Model)
    async def one_model(name: str) -> dict[str, Any]:
        server.check_model(name)
        return model()

    @app.post("/tokenize", response_model=Tokens)
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        server.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise InputError("Give one of prompt and messages.")
        encode = partial(runtime.prompt_ids, body.prompt if body.messages is None else body.messages)  # type: ignore[arg-type]
        tokens = await asyncio.get_running_loop().run_in_executor(None, encode)
        return {"count": len(tokens), "max_model_len": runtime.max_seq_len, "tokens": tokens}

    started = int(time.time())

    def model() -> dict[str, Any]:
        own = {
            "experts": runtime.expert_names, "router": runtime.bundle.manifest.models[0].name, "precision": runtime.precision, "precisions": [*server.runtimes],
            "fusion": runtime.fusion, "lam": runtime.lam, "speculation": runtime.options.speculation,
        }  # fmt: skip
        context = {"max_model_len": runtime.max_seq_len}
        return {"id": settings.model, "object": "model", "created": started, "owned_by": "fusionroute", **context, "fusionroute": own}


def add_generation(app: FastAPI, server: Server) -> None:
    """The routes that generate."""
    runtime, name = server.runtime, server.settings.model

    @app.post("/v1/completions", response_model=Completion, responses={200: {"content": EVENTS}})
    async def completions(request: Request, body: CompletionRequest) -> Response:
        server.check_model(body.model)
        options = body.options() | {"top_logprobs": body.logprobs or 0}
        prompts: list[Callable[[], list[int]]] = [partial(runtime.prompt_ids, prompt) for prompt in body.prompts]
        order = Order(server.runtime_in(body.extension.precision), prompts, body.n or 1, body.max_tokens or COMPLETION_TOKENS, options)
        answer = Answer("text_completion", name, runtime.tokenizer, body.extension.routing, body.logprobs is not None)
        return await server.answer(request, body, order, answer, [])

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses={200: {"content": EVENTS}})
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        server.check_model(body.model)
        if body.top_logprobs and not body.logprobs:
            raise InputError("top_logprobs needs logprobs: true.")
        options = body.options() | {"top_logprobs": body.top_logprobs or 0}
        options["grammar"] = options["grammar"] or tool_calls.forced(body)
        told = tool_calls.told(body)
        encode = partial(server.encode_chat, body.messages, tools=told, documents=body.documents)
        order = Order(
            server.runtime_in(body.extension.precision), [encode], body.n or 1, body.max_completion_tokens or body.max_tokens, options
        )
        answer = Answer("chat.completion", name, runtime.tokenizer, body.extension.routing, bool(body.logprobs))
        return await server.answer(request, body, order, answer, body.tools or [] if told else [])
