"""Bad requests: OpenAI's error object with one sentence, and never a status of the server's own fault."""

import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.errors import InputError
from fusionroute.runtime.serve.settings import Settings
from tests.support.server import MODEL, Served, served, wait_until

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "1"}]
REFUSED: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "no prompt": (COMPLETION, {}, "prompt: Field required."),
    "an unknown argument": (COMPLETION, {"prompt": "1", "max_token": 5}, "Unknown argument: max_token."),
    "a number as text": (COMPLETION, {"prompt": "1", "max_tokens": "5"}, "max_tokens: Input should be a valid integer."),
    "no token": (COMPLETION, {"prompt": "1", "max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1."),
    "too hot": (COMPLETION, {"prompt": "1", "temperature": 2.5}, "temperature: Input should be less than or equal to 2."),
    "too cold": (COMPLETION, {"prompt": "1", "temperature": 1e-9}, "temperature is 1e-09, expected 0 or at least 0.001: use 0 for greedy decoding."),
    "a penalty": (COMPLETION, {"prompt": "1", "presence_penalty": -3}, "presence_penalty: Input should be greater than or equal to -2."),
    "a bias for a word": (COMPLETION, {"prompt": "1", "logit_bias": {"a": 1}}, "The key 'a' of logit_bias is no token id: give ids as text, such as \"17\"."),
    "a bias beyond the vocabulary": (
        COMPLETION, {"prompt": "1", "logit_bias": {"99999": 1}}, "Token id 99999 of logit_bias is outside the vocabulary: expected 0 to 299.",
    ),
    "a token beyond it": (COMPLETION, {"prompt": [5, 999]}, "Token id 999 is outside the vocabulary: expected 0 to 299."),
    "a negative token": (COMPLETION, {"prompt": [-1]}, None),
    "an empty stop": (COMPLETION, {"prompt": "1", "stop": [""]}, "The stop string '' is not a str of at least one character: leave it out."),
    "echo": (COMPLETION, {"prompt": "1", "echo": True}, "echo: Input should be False."),
    "an expert": (COMPLETION, {"prompt": "1", "fusionroute": {"expert": "x"}}, "Unknown expert 'x': use one of expert0, expert1."),
    "no messages": (CHAT, {"messages": []}, "messages: List should have at least 1 item after validation, not 0."),
    "a message without a role": (CHAT, {"messages": [{"content": "1"}]}, 'Message 1 has no "role": give it one, a str.'),
    "alternatives alone": (CHAT, {"messages": USER, "top_logprobs": 2}, "top_logprobs needs logprobs: true."),
    "too many": (CHAT, {"messages": USER, "logprobs": True, "top_logprobs": 21}, "top_logprobs: Input should be less than or equal to 20."),
    "a wrong schema": (
        CHAT, {"messages": USER, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "foo"}}}},
        "The JSON schema is refused: Invalid type: foo.",
    ),
    "a wrong expression": (CHAT, {"messages": USER, "structured_outputs": {"regex": "(["}}, None),
    "two grammars": (
        CHAT, {"messages": USER, "response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        "A text has one grammar: give one of response_format and the fields of structured_outputs.",
    ),
    "a function that there is not": (
        CHAT, {"messages": USER, "tool_choice": {"type": "function", "function": {"name": "f"}}},
        "tool_choice names no function of tools: give one of them, or leave it out.",
    ),
    "a long prompt": (COMPLETION, {"prompt": "1 " * 3000}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_requests(server: Served, name: str) -> None:
    path, body, sentence = REFUSED[name]
    for stream in (False, True):
        answer = server.post(path, {"model": MODEL, "stream": stream} | body)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
        assert "\n" not in error["message"] and (sentence is None or error["message"] == sentence)
    wait_until(lambda: server.idle)


def test_other_statuses(server: Served) -> None:
    answer = server.post(COMPLETION, {"model": "gpt-9", "prompt": "1"})
    assert answer.status_code == 404
    assert answer.json()["error"] == {
        "message": "The model 'gpt-9' is not here: use 'tiny'.", "type": "not_found_error", "param": "model", "code": "model_not_found",
    }  # fmt: skip
    assert httpx.get(server.url + "/v2").status_code == 404
    assert httpx.get(server.url + COMPLETION).status_code == 405
    answer = server.complete("x" * (1 << 16))
    assert answer.status_code == 413 and answer.json()["error"]["message"] == "The request has more than 65536 bytes: send a shorter one."

    def pieces() -> Any:
        for _ in range(80):
            yield b" " * 1024

    assert httpx.post(server.url + COMPLETION, content=pieces()).status_code == 413
    for content in (b"", b"{", b"[" * 5000, b'{"a":' * 2000, b"\xff", b'{"model": "tiny", "prompt": "\\ud800"}', b"1" * 5000):
        answer = httpx.post(server.url + COMPLETION, content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 400 and set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_other_hosts_do_not_reach_this_machine_by_a_name_of_theirs(server: Served) -> None:
    for host, status in (("evil.example", 403), ("localhost", 200), ("127.0.0.1:1", 200), ("[::1]:80", 200), ("", 403)):
        assert httpx.get(server.url + "/health", headers={"host": host}).status_code == status


VALUES = st.sampled_from(
    [None, True, 0, -1, 3, 10**400, 0.5, 1e300, "", "ab", "12+30=", "\u0000", [], [1], [[1]], [""], {}, {"a": 1}, {"type": "x"}]
)  # fmt: skip
JSON = st.recursive(
    VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "role", "content"]), inner)
)
FIELDS = ("prompt", "messages", "max_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "n", "seed",
          "repetition_penalty", "logit_bias", "stop", "stream", "stream_options", "logprobs", "top_logprobs", "response_format", "tools",
          "tool_choice", "structured_outputs", "fusionroute", "min_tokens", "stop_token_ids", "ignore_eos", "documents", "x")  # fmt: skip


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from([COMPLETION, CHAT, "/tokenize"]), fields=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4))
def test_any_body_at_all_is_answered_or_refused(server: Served, path: str, fields: dict[str, Any]) -> None:
    body = (
        {"model": MODEL, "max_tokens": 2} | ({"prompt": "1"} if path == COMPLETION else {"messages": USER} if path == CHAT else {}) | fields
    )
    answer = server.post(path, body)
    assert answer.status_code < 500, (body, answer.text)
    assert answer.status_code in (200, 400), (body, answer.text)
    if answer.status_code == 400:
        assert set(json.loads(answer.text)["error"]) == {"message", "type", "param", "code"}


def test_a_key(bundles: Any) -> None:
    with served(FusionRuntime.load(bundles[0], precision="fp32"), api_key="secret", cors=("https://app.example",)) as running:
        assert httpx.get(running.url + "/health").status_code == 200
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}, {"authorization": "Bearer secret2"}):
            for path in ("/v1/models", "/metrics"):
                answer = httpx.get(running.url + path, headers=headers)
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        right = {"authorization": "Bearer secret", "origin": "https://app.example", "host": "any.example"}
        answer = httpx.get(running.url + "/v1/models", headers=right)
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://app.example"
        other = httpx.get(running.url + "/v1/models", headers=right | {"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


def test_listening_elsewhere_needs_a_key() -> None:
    for host in ("0.0.0.0", "192.168.1.5", "::", "example.com"):
        with pytest.raises(InputError) as caught:
            Settings(MODEL, host=host)
        assert str(caught.value) == (
            f"{host} is reached from other machines: give a key with --api-key or FUSIONROUTE_API_KEY, or say --insecure."
        )
        Settings(MODEL, host=host, api_key="x")
        Settings(MODEL, host=host, insecure=True)
    for host in ("127.0.0.1", "::1", "localhost", "127.3.2.1"):
        assert Settings(MODEL, host=host).loopback
