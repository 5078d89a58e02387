"""What /openapi.json says of answers, held against answers. tests/openapi draws requests from it."""

from typing import Any

import httpx
import jsonschema
import pytest

from fusionroute.runtime import FusionRuntime
from tests.support.server import MODEL, Served, served

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "12+30="}]
OWN = {"routing": True, "candidates": 2}
NUMBER = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}
ADD = {"type": "function", "function": {"name": "add", "parameters": NUMBER}}
CALLS: dict[str, tuple[str, Any, int]] = {
    "completion": (COMPLETION, {"prompt": "1", "max_tokens": 3}, 200),
    "completions": (COMPLETION, {"prompt": ["1", "2"], "n": 2, "max_tokens": 3, "logprobs": 2, "fusionroute": OWN}, 200),
    "an expert alone": (
        COMPLETION,
        {"prompt": "1", "max_tokens": 2, "fusionroute": {"routing": True, "expert": "expert1", "lam": 0.0}},
        200,
    ),
    "stream": (COMPLETION, {"prompt": "1", "max_tokens": 3, "stream": True}, 200),
    "chat": (CHAT, {"messages": USER, "max_tokens": 3}, 200),
    "chats": (CHAT, {"messages": USER, "n": 2, "max_tokens": 3, "logprobs": True, "top_logprobs": 2, "fusionroute": OWN}, 200),
    "call": (CHAT, {"messages": USER, "tools": [ADD], "tool_choice": "required"}, 200),
    "no prompt": (COMPLETION, {}, 400),
    "no role": (CHAT, {"messages": [{}]}, 400),
    "another model": (CHAT, {"messages": USER, "model": "gpt"}, 404),
    "large": (COMPLETION, {"prompt": "1" * (1 << 16)}, 413),
    "tokens": ("/tokenize", {"prompt": "1"}, 200),
    "tokens of messages": ("/tokenize", {"messages": USER}, 200),
    "no tokens": ("/tokenize", {}, 400),
}
PAGES = {"/health": 200, "/metrics": 200, "/v1/models": 200, f"/v1/models/{MODEL}": 200, "/v1/models/gpt": 404}


@pytest.fixture(scope="module")
def told(server: Served) -> dict[str, Any]:
    content: dict[str, Any] = httpx.get(server.url + "/openapi.json").json()
    return content


def check(told: dict[str, Any], path: str, method: str, answer: httpx.Response) -> None:
    """The status, the media type and the content are told."""
    answers = told["paths"][path][method]["responses"]
    key = str(answer.status_code) if str(answer.status_code) in answers else f"{answer.status_code // 100}XX"
    media = answer.headers["content-type"].partition(";")[0]
    schema = answers[key]["content"][media]["schema"]
    if media == "application/json":
        jsonschema.validate(answer.json(), {**schema, "components": told["components"]})


@pytest.mark.parametrize("name", CALLS)
def test_answers_are_as_told(server: Served, told: dict[str, Any], name: str) -> None:
    path, body, status = CALLS[name]
    answer = server.post(path, {"model": MODEL} | body)
    assert answer.status_code == status, answer.text
    check(told, path, "post", answer)


def test_pages_are_as_told(server: Served, told: dict[str, Any]) -> None:
    for path, status in PAGES.items():
        answer = httpx.get(server.url + path)
        assert answer.status_code == status
        check(told, "/v1/models/{name}" if path.startswith("/v1/models/") else path, "get", answer)
    assert set(told["paths"]) == {COMPLETION, CHAT, "/tokenize", "/health", "/metrics", "/v1/models", "/v1/models/{name}"}


def test_a_field_that_is_not_told_would_be_noticed(server: Served, told: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusionroute.runtime.serve.answers.REASONS", {"length": "cut"})
    with pytest.raises(jsonschema.ValidationError):
        check(told, COMPLETION, "post", server.complete("1", max_tokens=2))


def test_refusals_have_the_headers_that_http_asks_for(bundles: Any) -> None:
    with served(FusionRuntime.load(bundles[0], precision="fp32"), api_key="secret") as running:
        right = {"authorization": "Bearer secret"}
        assert httpx.get(running.url + "/v1/models").headers["www-authenticate"] == "Bearer"
        wrong = httpx.get(running.url + COMPLETION, headers=right)
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
