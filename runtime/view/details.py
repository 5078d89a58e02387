"""What is told of a token: the objects that pages draw and that the server sends."""

from __future__ import annotations

import math
from typing import Any

from fusionroute.runtime.text import Ranked, Text, Token


def details(token: Token, tokenizer: Text | None) -> dict[str, Any]:
    """Who answered, and the routing scores in the order of the bundle's experts, null where the router did not run.

    With the candidates of a token, if it has them: by model, the likeliest first.
    """
    routing = [number(score) for score in token.routing.tolist()]
    told: dict[str, Any] = {"id": token.id, "text": token.text, "expert": token.expert, "routing": routing}
    if token.candidates is not None:
        told["candidates"] = {model: likeliest(ranked, tokenizer) for model, ranked in token.candidates._asdict().items()}
    return told


def likeliest(ranked: Ranked, tokenizer: Text | None) -> list[dict[str, Any]]:
    """Tokens with their texts."""
    return [{"id": id, "text": piece(id, tokenizer), "logprob": number(value)} for id, value in ranked]


def piece(id: int, tokenizer: Text | None) -> str:
    """The text of a token alone; its id where there is no tokenizer."""
    return str(id) if tokenizer is None else tokenizer.piece(id)


def number(value: float) -> float | None:
    """A number as JSON has it."""
    return value if math.isfinite(value) else None
