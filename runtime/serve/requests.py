"""What clients send: OpenAI's fields, and those of vLLM's and our own that have a meaning here. Others are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from fusionroute.runtime.errors import InputError
from fusionroute.runtime.grammar import Grammar
from fusionroute.runtime.sampling import MOST_TOP_LOGPROBS

MOST_CHOICES = 16
MOST_PROMPTS = 16

Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
ROLE = {"type": "object", "properties": {"role": {"type": "string"}}, "required": ["role"]}  # the runtime says what is wrong
Messages = Annotated[list[Annotated[dict[str, Any], WithJsonSchema(ROLE)]], Field(min_length=1)]
TokenIds = list[Annotated[int, Field(ge=0)]]


class Body(BaseModel):
    """Strict: a text is no number, and nothing that is not known is ignored."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    """include_usage: a last chunk counts the tokens."""

    include_usage: bool = False
    include_obfuscation: bool | None = None  # as a privacy measure of OpenAI's: nothing is added here


class Extension(Body):
    """What no other server has. expert: answers every token. lam, fusion: instead of the bundle's. routing: also return
    the expert and the routing scores of each token. candidates: with them, so many of the likeliest tokens of the
    router, the expert and their fusion. drafts: whether tokens may be drafted, where the server does so.
    precision: one of those that the server has loaded.
    """

    expert: str | None = None
    lam: Annotated[float, Field(ge=0, le=1)] | None = None
    fusion: Literal["weighted", "additive"] | None = None
    routing: bool = False
    candidates: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] = 0
    drafts: bool = True
    precision: str | None = None


class SchemaFormat(Body):
    """The `json_schema` of a response format."""

    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema", default_factory=lambda: {"type": "object"})
    strict: bool | None = None


class TextFormat(Body):
    """Any text."""

    type: Literal["text"]


class JsonFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Body):
    """JSON that is valid by a schema."""

    type: Literal["json_schema"]
    json_schema: SchemaFormat


class StructuredOutputs(Body):
    """vLLM's field for what OpenAI's `response_format` does not have. One of them."""

    json_: dict[str, Any] | None = Field(alias="json", default=None)
    regex: str | None = None
    grammar: str | None = None


class Generating(Body):
    """What both kinds of requests have."""

    model: str
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = 1
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=-1)] | None = 0
    min_p: Annotated[float, Field(ge=0, le=1)] | None = 0.0
    presence_penalty: Penalty | None = 0.0
    frequency_penalty: Penalty | None = 0.0
    repetition_penalty: Annotated[float, Field(gt=0)] | None = 1.0
    logit_bias: dict[str, Bias] | None = Field(None, json_schema_extra={"propertyNames": {"pattern": "^[0-9]{1,11}$"}})
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0)] = 0
    response_format: TextFormat | JsonFormat | JsonSchemaFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    fusionroute: Extension | None = None
    user: str | None = None  # these say nothing about the text, and are not kept
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None

    @property
    def extension(self) -> Extension:
        """Defaults where there is none."""
        return self.fusionroute or Extension()

    def options(self) -> dict[str, Any]:
        """The options of `FusionRuntime.stream`. Raises InputError."""
        extension = self.extension
        if extension.candidates and not extension.routing:
            raise InputError("candidates needs routing: true.")
        return {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": self.top_p or 1.0,
            "top_k": max(self.top_k or 0, 0),
            "min_p": self.min_p or 0.0,
            "presence_penalty": self.presence_penalty or 0.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "repetition_penalty": self.repetition_penalty or 1.0,
            "logit_bias": biases(self.logit_bias),
            "seed": None if self.seed is None else self.seed % (1 << 63),
            "stop": self.stop or (),
            "stop_token_ids": self.stop_token_ids or (),
            "ignore_eos": self.ignore_eos,
            "min_new_tokens": self.min_tokens,
            "expert": extension.expert,
            "lam": extension.lam,
            "fusion": extension.fusion,
            "candidates": extension.candidates,
            "drafts": extension.drafts,
            "grammar": self.grammar(),
        }

    def grammar(self) -> Grammar | None:
        """What the text must look like. Raises InputError for several grammars, and for a schema that is none."""
        asked = []
        if isinstance(self.response_format, JsonFormat):
            asked.append(Grammar.json_object())
        if isinstance(self.response_format, JsonSchemaFormat):
            asked.append(Grammar.json_schema(self.response_format.json_schema.schema_))
        if (outputs := self.structured_outputs) is not None:
            asked += [Grammar.json_schema(outputs.json_)] if outputs.json_ is not None else []
            asked += [Grammar.regex(outputs.regex)] if outputs.regex is not None else []
            asked += [Grammar.lark(outputs.grammar)] if outputs.grammar is not None else []
        if len(asked) > 1:
            raise InputError("A text has one grammar: give one of response_format and the fields of structured_outputs.")
        return asked[0] if asked else None


class CompletionRequest(Generating):
    """POST /v1/completions."""

    prompt: str | TokenIds | Annotated[list[str] | list[TokenIds], Field(min_length=1, max_length=MOST_PROMPTS)]
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several."""
        several = isinstance(self.prompt, list) and self.prompt and not isinstance(self.prompt[0], int)
        return list(self.prompt) if several else [self.prompt]  # type: ignore[arg-type, list-item]


class NamedFunction(Body):
    """The function of a tool choice."""

    name: str


class ToolChoice(Body):
    """One function."""

    type: Literal["function"]
    function: NamedFunction


class Function(Body):
    """The function of a tool."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """What a model may call."""

    type: Literal["function"]
    function: Function


class ChatRequest(Generating):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None  # one call at a time comes anyway
    documents: list[dict[str, Any]] | None = None
    modalities: list[Literal["text"]] | None = None


class TokenizeRequest(Body):
    """POST /tokenize: a text, or messages through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None


def biases(bias: dict[str, float] | None) -> dict[int, float] | None:
    """A logit bias, whose keys JSON makes texts; −100 bars a token, as with OpenAI. Raises InputError."""
    if not bias:
        return None
    if wrong := [key for key in bias if not (key.isascii() and key.isdecimal() and len(key) < 12)]:
        raise InputError(f'The key {wrong[0][:20]!r} of logit_bias is no token id: give ids as text, such as "17".')
    return {int(key): float("-inf") if value == -100 else value for key, value in bias.items()}
