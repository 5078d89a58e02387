"""OpenAI's own client against a server: every feature, and the texts are those of `generate`."""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest

from fusionroute.runtime import FusionRuntime, Grammar
from tests.support.server import MODEL, Served, served, wait_until

openai = pytest.importorskip("openai")

PROMPT = "12+30="
MESSAGES: Any = [{"role": "user", "content": "12+30="}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
TOOL: Any = {
    "type": "function",
    "function": {"name": "add", "description": "Add.", "parameters": SCHEMA},
}
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.9, "seed": 3},
    {"temperature": 0.7, "top_p": 0.9, "seed": 5, "presence_penalty": 0.5, "frequency_penalty": 0.25},
    {"temperature": 0, "logit_bias": {"9": 3.5, "12": -100}},
]


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[Any]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key=server.key, max_retries=0) as connected:
        yield connected


def short_object(rt: FusionRuntime) -> dict[int, float]:
    """A bias under which the text of a JSON object is soon over."""
    return {rt.encode('"')[-1]: 40.0, rt.encode("}")[-1]: 20.0}


def own(options: dict[str, Any]) -> dict[str, Any]:
    """The runtime's names and values."""
    bias = {int(id): -math.inf if value == -100 else value for id, value in options.get("logit_bias", {}).items()}
    return options | ({"logit_bias": bias} if bias else {})


def test_models(client: Any, rt: FusionRuntime) -> None:
    assert [model.id for model in client.models.list().data] == [MODEL]
    assert client.models.retrieve(MODEL).fusionroute["experts"] == rt.expert_names


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_completions_are_what_generate_gives(client: Any, rt: FusionRuntime, options: dict[str, Any]) -> None:
    expected = rt.generate(PROMPT, 12, **own(options))
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=12, **options)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected.text, expected.finish_reason)
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert answer.usage.prompt_tokens == len(rt.encode(PROMPT))
    pieces = list(client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=12, stream=True, **options))
    assert "".join(piece.choices[0].text for piece in pieces) == expected.text
    assert pieces[-1].choices[0].finish_reason == expected.finish_reason and pieces[0].usage is None
    assert len({piece.id for piece in pieces}) == 1


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_chats_are_what_generate_gives(client: Any, rt: FusionRuntime, options: dict[str, Any]) -> None:
    expected = rt.generate(MESSAGES, 12, **own(options))
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=12, **options)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (expected.text, expected.finish_reason)
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_completion_tokens=12, stream=True, stream_options={"include_usage": True}, **options
    )
    *pieces, last = list(stream)
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected.text
    assert pieces[-1].choices[0].finish_reason == expected.finish_reason
    assert last.choices == [] and last.usage.completion_tokens == len(expected.token_ids)


def test_without_a_limit_a_chat_goes_to_its_end_and_a_completion_has_16_tokens(client: Any, rt: FusionRuntime) -> None:
    answer = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 16
    chat = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=0, stop="x", extra_body={"ignore_eos": True, "stop_token_ids": [5]}
    )
    expected = rt.generate(MESSAGES, rt.max_seq_len, stop="x", ignore_eos=True, stop_token_ids=[5])
    assert (chat.choices[0].message.content, chat.choices[0].finish_reason) == (expected.text, expected.finish_reason)


def test_several_choices_and_prompts(client: Any, rt: FusionRuntime) -> None:
    """Each prompt has `n` choices, one behind the other, with the seeds that follow the given one."""
    options = {"temperature": 1.0, "max_tokens": 6}
    answer = client.completions.create(model=MODEL, prompt=["1+1=", "2+2="], n=2, seed=7, **options)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    expected = [rt.generate(prompt, 6, temperature=1.0, seed=seed).text for prompt in ("1+1=", "2+2=") for seed in (7, 8)]
    assert [choice.text for choice in answer.choices] == expected
    pieces = client.completions.create(model=MODEL, prompt=[[5, 6, 7], [8, 9]], n=2, seed=7, stream=True, **options)
    texts: dict[int, str] = {}
    for piece in pieces:
        texts[piece.choices[0].index] = texts.get(piece.choices[0].index, "") + piece.choices[0].text
    assert [texts[n] for n in range(4)] == [
        rt.generate(ids, 6, temperature=1.0, seed=seed).text for ids in ([5, 6, 7], [8, 9]) for seed in (7, 8)
    ]


def test_logprobs(client: Any, rt: FusionRuntime) -> None:
    expected = rt.generate(MESSAGES, 5, top_logprobs=3, ignore_eos=True)
    body: Any = {"ignore_eos": True}
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3, extra_body=body
    )
    content = answer.choices[0].logprobs.content
    assert [each.logprob for each in content] == pytest.approx(expected.logprobs, abs=1e-4)
    tokenizer = rt.tokenizer
    assert tokenizer is not None
    pieces = [tokenizer.decode([id], skip_special_tokens=False) for id in expected.token_ids]
    assert [each.token for each in content] == pieces
    for each, top in zip(content, expected.top_logprobs, strict=True):
        assert [other.logprob for other in each.top_logprobs] == pytest.approx([value for _, value in top], abs=1e-4)
    answer = client.completions.create(
        model=MODEL, prompt=rt.prompt_ids(MESSAGES), max_tokens=5, temperature=0, logprobs=2, extra_body=body
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs.tokens == pieces and logprobs.token_logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    assert len(logprobs.top_logprobs) == len(logprobs.text_offset) == 5


def test_options_of_vllm(client: Any, rt: FusionRuntime) -> None:
    options: dict[str, Any] = {"top_k": 8, "min_p": 0.02, "repetition_penalty": 1.1}
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=12, temperature=0.9, seed=3, extra_body=options)
    assert answer.choices[0].text == rt.generate(PROMPT, 12, temperature=0.9, seed=3, **options).text


def test_json_and_grammars(client: Any, rt: FusionRuntime) -> None:
    format: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    options: Any = {"model": MODEL, "messages": MESSAGES, "temperature": 0.8, "seed": 1}
    answer = client.chat.completions.create(response_format=format, **options)
    jsonschema.validate(json.loads(answer.choices[0].message.content), SCHEMA)
    expected = rt.generate(MESSAGES, rt.max_seq_len, temperature=0.8, seed=1, grammar=Grammar.json_schema(SCHEMA))
    assert answer.choices[0].message.content == expected.text
    bias = short_object(rt)
    answer = client.chat.completions.create(
        response_format={"type": "json_object"}, logit_bias={str(id): value for id, value in bias.items()}, **options
    )
    expected = rt.generate(MESSAGES, rt.max_seq_len, temperature=0.8, seed=1, grammar=Grammar.json_object(), logit_bias=bias)
    assert answer.choices[0].message.content == expected.text and isinstance(json.loads(expected.text), dict)
    for outputs, text in (({"regex": "[0-9]{4}"}, None), ({"grammar": 'start: "yes"'}, "yes"), ({"json": {"const": 5}}, "5")):
        answer = client.chat.completions.create(extra_body={"structured_outputs": outputs}, **options)
        content = answer.choices[0].message.content
        assert content == text if text else content.isdecimal() and len(content) == 4


def test_tools(client: Any, rt: FusionRuntime) -> None:
    choices: Any = ("required", {"type": "function", "function": {"name": "add"}})
    for choice in choices:
        options: Any = {"model": MODEL, "messages": MESSAGES, "tools": [TOOL], "tool_choice": choice, "temperature": 0.5, "seed": 2}
        answer = client.chat.completions.create(**options)
        call = answer.choices[0].message.tool_calls[0]
        assert answer.choices[0].finish_reason == "tool_calls" and answer.choices[0].message.content is None
        assert call.function.name == "add"
        jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
        pieces = list(client.chat.completions.create(stream=True, **options))
        streamed = [each for piece in pieces for each in piece.choices[0].delta.tool_calls or ()]
        assert [(each.index, each.function.name, each.function.arguments) for each in streamed] == [(0, "add", call.function.arguments)]
        assert pieces[-1].choices[0].finish_reason == "tool_calls"


def test_calls_and_what_they_returned_reach_the_template(client: Any, rt: FusionRuntime) -> None:
    messages: Any = [
        *MESSAGES,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "42"},
    ]
    answer = client.chat.completions.create(model=MODEL, messages=messages, tools=[TOOL], temperature=0, max_tokens=4)
    assert answer.choices[0].message.content == rt.generate(rt.prompt_ids(messages, tools=[TOOL]), 4).text


def test_routing(client: Any, rt: FusionRuntime) -> None:
    expected = list(rt.stream(PROMPT, 6, lam=0.3))
    options: Any = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 6}
    answer = client.completions.create(extra_body={"fusionroute": {"routing": True, "lam": 0.3}}, **options)
    told = answer.choices[0].fusionroute["tokens"]
    assert [(each["id"], each["expert"], each["text"]) for each in told] == [(token.id, token.expert, token.text) for token in expected]
    for each, token in zip(told, expected, strict=True):
        assert each["routing"] == pytest.approx(token.routing.tolist(), abs=1e-4)
    pieces = client.completions.create(stream=True, extra_body={"fusionroute": {"routing": True, "lam": 0.3}}, **options)
    assert [each["id"] for piece in pieces for each in piece.choices[0].fusionroute["tokens"]] == [token.id for token in expected]
    pinned = client.completions.create(extra_body={"fusionroute": {"routing": True, "lam": 0.0, "expert": rt.expert_names[1]}}, **options)
    assert {each["expert"] for each in pinned.choices[0].fusionroute["tokens"]} == {rt.expert_names[1]}
    assert pinned.choices[0].fusionroute["tokens"][0]["routing"] == [None] * len(rt.expert_names)


def test_errors_are_the_clients_own(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="The prompt is empty") as caught:
        client.completions.create(model=MODEL, prompt=[])
    assert caught.value.body["type"] == "invalid_request_error"
    with pytest.raises(openai.NotFoundError, match="The model 'gpt' is not here: use 'tiny'") as missing:
        client.chat.completions.create(model="gpt", messages=MESSAGES)
    assert missing.value.code == "model_not_found"


def test_a_wrong_key_is_the_clients_own_error(rt: FusionRuntime) -> None:
    with served(FusionRuntime.load(rt.bundle.folder, precision="fp32"), api_key="secret") as running:
        for key, right in (("secret", True), ("wrong", False)):
            with openai.OpenAI(base_url=running.url + "/v1", api_key=key, max_retries=0) as connected:
                if right:
                    assert connected.models.list().data
                    continue
                with pytest.raises(openai.AuthenticationError) as caught:
                    connected.models.list()
                assert caught.value.code == "invalid_api_key"


def test_a_stream_that_is_closed_in_the_middle(client: Any, server: Served) -> None:
    with client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=900, stream=True, temperature=0, extra_body={"ignore_eos": True}
    ) as stream:
        for _ in range(5):
            next(stream)
    wait_until(lambda: running_requests(server) == 0)


def running_requests(server: Served) -> int:
    """As /metrics tells, which a server in another process does too."""
    text = httpx.get(server.url + "/metrics", headers={"authorization": f"Bearer {server.key}"}).text
    return int(float(re.findall(r"^fusionroute_requests_running (\S+)$", text, re.MULTILINE)[0]))
