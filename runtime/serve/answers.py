"""What requests get, in OpenAI's form."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from fusionroute.runtime.serve.jobs import Finish
from fusionroute.runtime.text import Text, Token
from fusionroute.runtime.view.details import details, number, piece

REASONS = {"cancelled": "stop", "deadline": "length"}  # for which OpenAI has no word


class Answer:
    """The frame of one answer, or of its chunks. kind: "text_completion" or "chat.completion"."""

    def __init__(self, kind: str, model: str, tokenizer: Text | None, routing: bool, logprobs: bool):
        self.id = f"{'chatcmpl' if kind.startswith('chat') else 'cmpl'}-{uuid.uuid4().hex}"
        self.chat = kind.startswith("chat")
        self._kind, self._model, self._created = kind, model, int(time.time())
        self._tokenizer, self._routing, self._logprobs = tokenizer, routing, logprobs
        self._offsets: dict[int, int] = {}  # characters of each choice so far

    def whole(self, choices: list[dict[str, Any]], prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
        """All of it."""
        return self._frame(self._kind, choices) | {"usage": usage(prompt_tokens, completion_tokens)}

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A piece of it."""
        return self._frame(f"{self._kind}.chunk" if self.chat else self._kind, choices)

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model, "choices": choices}

    def details(self, choice: int, tokens: Sequence[Token], end: Finish | None) -> dict[str, Any]:
        """`finish_reason` of a choice, `logprobs` of some of its tokens, and `fusionroute`: what OpenAI has no field for."""
        reason = None if end is None else end.reason
        fields: dict[str, Any] = {"finish_reason": REASONS.get(reason or "", reason), "logprobs": None}
        if self._logprobs:
            fields["logprobs"] = self._chat_logprobs(tokens) if self.chat else self._logprobs_of(choice, tokens)
        own: dict[str, Any] = {"tokens": [details(token, self._tokenizer) for token in tokens]} if self._routing else {}
        if self._routing and end is not None:
            own |= {"drafted": end.drafted, "accepted": end.accepted}
        if reason in REASONS:
            own["finish_reason"] = reason
        return fields | ({"fusionroute": own} if own else {})

    def _piece(self, id: int) -> str:
        return piece(id, self._tokenizer)

    def _bytes(self, id: int) -> list[int]:
        byte = None if self._tokenizer is None else self._tokenizer.byte(id)
        return list(self._piece(id).encode()) if byte is None else [byte]

    def _one(self, id: int, logprob: float) -> dict[str, Any]:
        return {"token": self._piece(id), "logprob": number(logprob), "bytes": self._bytes(id)}

    def _chat_logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        content = [
            self._one(token.id, token.logprob) | {"top_logprobs": [self._one(*each) for each in token.top_logprobs]} for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _logprobs_of(self, choice: int, tokens: Sequence[Token]) -> dict[str, Any]:
        offsets = []
        for token in tokens:
            offsets.append(self._offsets.get(choice, 0))
            self._offsets[choice] = offsets[-1] + len(token.text)
        return {
            "tokens": [self._piece(token.id) for token in tokens],
            "token_logprobs": [number(token.logprob) for token in tokens],
            "top_logprobs": [{self._piece(id): number(value) for id, value in token.top_logprobs} for token in tokens],
            "text_offset": offsets,
        }


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Counts of tokens."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
