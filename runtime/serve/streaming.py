"""A job's events as one answer, or as server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fusionroute.runtime.errors import FusionError
from fusionroute.runtime.serve.answers import Answer, usage
from fusionroute.runtime.serve.errors import ApiError, of_runtime
from fusionroute.runtime.serve.jobs import Finish, Job, Prompt
from fusionroute.runtime.serve.requests import Tool
from fusionroute.runtime.serve.tool_calls import StreamedCalls, read_calls
from fusionroute.runtime.text import Token


async def collected(job: Job, answer: Answer, tools: list[Tool]) -> dict[str, Any]:
    """The whole answer. Raises FusionError."""
    tokens: dict[int, list[Token]] = {}
    ends: dict[int, Finish] = {}
    async for event in job.follow():
        if isinstance(event, Prompt):
            job.prompt_tokens += event.tokens
        elif isinstance(event, Finish):
            ends[event.choice] = event
            tokens.setdefault(event.choice, [])
        else:
            tokens.setdefault(event[0], []).append(event[1])
    choices = []
    for number in sorted(ends):
        text = "".join(token.text for token in tokens[number])
        choice: dict[str, Any] = {"index": number, **answer.details(number, tokens[number], ends[number])}
        if answer.chat:
            text, calls = read_calls(text, tools)
            choice["message"] = {"role": "assistant", "content": text or None if calls else text, "refusal": None}
            if calls:
                choice["message"]["tool_calls"] = calls
                choice["finish_reason"] = "tool_calls"
        else:
            choice["text"] = text
        choices.append(choice)
    return answer.whole(choices, job.prompt_tokens, job.completion_tokens)


async def streamed(job: Job, answer: Answer, tools: list[Tool], include_usage: bool) -> AsyncIterator[bytes]:
    """Server-sent events. With tools, text is held back while it may be a call."""
    begun: set[int] = set()
    choices: dict[int, StreamedCalls] = {}
    extra = {"usage": None} if include_usage else {}

    def event(number: int, text: str, tokens: list[Token], end: Finish | None = None, calls: Sequence[dict[str, Any]] = ()) -> bytes:
        choice = {"index": number, **answer.details(number, tokens, end)}
        if answer.chat:
            delta: dict[str, Any] = {} if number in begun else {"role": "assistant"}
            begun.add(number)
            if text or tokens or delta:
                delta["content"] = text
            if calls:
                delta["tool_calls"] = [{"index": place, **call} for place, call in enumerate(calls)]
                choice["finish_reason"] = "tool_calls"
            choice["delta"] = delta
        else:
            choice["text"] = text
        return sse(answer.chunk([choice]) | extra)

    try:
        async for each in job.follow():
            if isinstance(each, Prompt):
                job.prompt_tokens += each.tokens
            elif isinstance(each, Finish):
                text, tokens, calls = choices.pop(each.choice, StreamedCalls(tools)).finish()
                yield event(each.choice, text, tokens, each, calls)
            elif tools:
                for token in choices.setdefault(each[0], StreamedCalls(tools)).add(each[1]):
                    yield event(each[0], token.text, [token])
            else:
                yield event(each[0], each[1].text, [each[1]])
        if include_usage:
            yield sse(answer.chunk([]) | {"usage": usage(job.prompt_tokens, job.completion_tokens)})
    except FusionError as error:
        yield sse(of_runtime(error).content)
    except ApiError as error:
        yield sse(error.content)
    yield b"data: [DONE]\n\n"


def sse(content: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode() + b"\n\n"
