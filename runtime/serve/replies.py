"""What the routes return, as /openapi.json tells it. The objects themselves are made in `answers` and `streaming`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Reply(BaseModel):
    """Closed: every field that may come is told."""

    model_config = ConfigDict(extra="forbid")


class Error(Reply):
    """One sentence, and what OpenAI's clients sort errors by."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(Reply):
    """Of every status from 400 on."""

    error: Error


class Health(Reply):
    """GET /health."""

    status: Literal["ok", "draining"]


class OwnModel(Reply):
    """What no other server tells of a model."""

    experts: list[str]
    router: str
    precision: str
    precisions: list[str]
    fusion: str
    lam: float
    speculation: str


class Model(Reply):
    """GET /v1/models/{name}."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    fusionroute: OwnModel


class Models(Reply):
    """GET /v1/models."""

    object: Literal["list"]
    data: list[Model]


class Tokens(Reply):
    """POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]


class Candidate(Reply):
    """A token that a model proposed."""

    id: int
    text: str
    logprob: float | None


class Candidates(Reply):
    """By model, the likeliest first."""

    router: list[Candidate]
    expert: list[Candidate]
    fused: list[Candidate]


class RoutedToken(Reply):
    """Who answered. routing: scores in the order of the model's experts, null where the router did not run."""

    id: int
    text: str
    expert: str
    routing: list[float | None]
    candidates: Candidates | None = None


class Own(Reply):
    """What OpenAI has no field for. finish_reason: "deadline" or "cancelled"."""

    tokens: list[RoutedToken] | None = None
    drafted: int | None = None
    accepted: int | None = None
    finish_reason: Literal["deadline", "cancelled"] | None = None


class Usage(Reply):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(Reply):
    """One entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None]]
    text_offset: list[int]


class CompletionChoice(Reply):
    """One text."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: CompletionLogprobs | None
    fusionroute: Own | None = None


class Completion(Reply):
    """POST /v1/completions, not streamed."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class Alternative(Reply):
    """A token that could have stood here."""

    token: str
    logprob: float | None
    bytes: list[int]


class TokenLogprob(Alternative):
    """A token that stands here."""

    top_logprobs: list[Alternative]


class ChatLogprobs(Reply):
    """One entry for each token."""

    content: list[TokenLogprob]
    refusal: None


class CalledFunction(Reply):
    """arguments: JSON."""

    name: str
    arguments: str


class ToolCall(Reply):
    """A function that the model calls."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class Message(Reply):
    """content: null beside calls without a text."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Reply):
    """One answer."""

    index: int
    message: Message
    finish_reason: Literal["stop", "length", "tool_calls"]
    logprobs: ChatLogprobs | None
    fusionroute: Own | None = None


class ChatCompletion(Reply):
    """POST /v1/chat/completions, not streamed."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


REFUSED: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorReply, "description": "The request is refused: the sentence says why."},
    "5XX": {"model": ErrorReply, "description": "The server shuts down, has no time left, or failed."},
}
DATA = {"type": "string", "description": "A chunk of OpenAI's form as JSON; an error, where the text breaks off; at the end [DONE]."}
EVENT = {"type": "object", "properties": {"data": DATA}, "required": ["data"], "description": "With stream: one of the events."}
EVENTS = {"text/event-stream": {"schema": EVENT}}
