"""Functions that a model may call: told to it by the chat template, and read out of its answer."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from typing import Any

from fusionroute.runtime.errors import InputError
from fusionroute.runtime.grammar import Grammar
from fusionroute.runtime.serve.requests import ChatRequest, Tool, ToolChoice
from fusionroute.runtime.text import Token

MARK = "<tool_call>"  # as Hermes, Qwen and SmolLM write them
MARKED = re.compile(rf"\s*{MARK}\s*(.*?)\s*(?:</tool_call>\s*|$)", re.DOTALL)


def told(body: ChatRequest) -> list[dict[str, Any]] | None:
    """What the chat template is given."""
    if not body.tools or body.tool_choice == "none":
        return None
    return [tool.model_dump(exclude_none=True) for tool in body.tools]


def forced(body: ChatRequest) -> Grammar | None:
    """The grammar of a call that must come; None where it may be left out. Raises InputError for an unknown function."""
    choice = body.tool_choice
    if choice in (None, "none", "auto"):
        return None
    tools = body.tools or []
    if isinstance(choice, ToolChoice):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
    if not tools:
        raise InputError("tool_choice names no function of tools: give one of them, or leave it out.")
    if body.grammar() is not None:
        raise InputError("A call that must come has a grammar of its own: leave out response_format or tool_choice.")
    return Grammar.json_schema({"anyOf": [call_schema(tool) for tool in tools]})


def call_schema(tool: Tool) -> dict[str, Any]:
    """The JSON of a call."""
    return {
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, "arguments": tool.function.parameters or {"type": "object"}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def read_calls(text: str, tools: Sequence[Tool]) -> tuple[str, list[dict[str, Any]]]:
    """The text beside the calls in an answer, and the calls as OpenAI writes them."""
    if not tools:
        return text, []
    names = {tool.function.name for tool in tools}
    calls = [call for part in MARKED.findall(text) for call in parsed(part, names)]
    if calls:
        return MARKED.sub("", text), calls
    calls = parsed(text, names)  # some models, and every answer that must be a call, write nothing else
    return ("", calls) if calls else (text, [])


class StreamedCalls:
    """A choice as it comes: its tokens are passed on as soon as they cannot belong to a call any more."""

    def __init__(self, tools: Sequence[Tool]):
        self._tools, self._text, self._passed = tools, "", 0  # the last counts characters
        self._held: list[Token] = []

    def add(self, token: Token) -> list[Token]:
        """The next token; returns those to pass on."""
        self._held.append(token)
        self._text += token.text
        certain, count = certain_length(self._text), 0
        while count < len(self._held) and self._passed + len(self._held[count].text) <= certain:
            self._passed += len(self._held[count].text)
            count += 1
        ready, self._held = self._held[:count], self._held[count:]
        return ready

    def finish(self) -> tuple[str, list[Token], list[dict[str, Any]]]:
        """The rest of the text, the tokens that were not passed on, and the calls."""
        text, calls = read_calls(self._text, self._tools)
        return text[self._passed :], self._held, calls


def certain_length(text: str) -> int:
    """How many leading characters of an unfinished answer `read_calls` leaves as they are, whatever comes behind it."""
    if text.lstrip()[:1] in ("", "{", "["):  # it may be nothing but the JSON of a call
        return 0
    mark = text.find(MARK)
    if mark < 0:
        last = range(max(len(text) - len(MARK) + 1, 0), len(text))
        mark = next((place for place in last if MARK.startswith(text[place:])), len(text))
    return len(text[:mark].rstrip())


def parsed(text: str, names: set[str]) -> list[dict[str, Any]]:
    """The calls that a JSON text holds; none where it is something else."""
    try:
        content = json.loads(text)
        calls = [call(each, names) for each in (content if isinstance(content, list) else [content])]
    except (ValueError, RecursionError):
        return []
    return calls


def call(content: Any, names: set[str]) -> dict[str, Any]:
    """A call as OpenAI writes it. Raises ValueError for JSON that is none, and for numbers that JSON does not have."""
    name = content.get("name") if isinstance(content, dict) else None
    if not isinstance(name, str) or name not in names:
        raise ValueError(name)
    arguments = content.get("arguments", content.get("parameters", {}))
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    written = written.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # JSON may escape halves of a pair
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": {"name": name, "arguments": written}}
