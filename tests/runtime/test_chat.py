"""Chat templates: what transformers renders is what the runtime renders."""

from datetime import datetime
from typing import Any

import pytest

from fusionroute.runtime.chat import render
from fusionroute.runtime.errors import InputError

GEMMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

LLAMA31 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is defined and tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role == 'ignored' %}
        {%- continue %}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# Blocks on lines of their own, JSON, and what HTML escaping would change.
LINES = """{% for message in messages %}
    {% if message.role == "user" %}
{{ message | tojson }} {{ message | tojson(indent=2) }}
    {% endif %}
{{ message.content }}
{% endfor %}
{{ eos_token }}
"""

TALK = [
    {"role": "user", "content": '  What is 12+30? <b>&</b> "quoted" it\'s\n'},
    {"role": "assistant", "content": "42 – 答えは 42 👩‍🚀"},
    {"role": "user", "content": "{{ bos_token }} {% raw %}"},
]


def by_transformers(template: str, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    transformers: Any = pytest.importorskip("transformers")
    tokenizers: Any = pytest.importorskip("tokenizers")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()), bos_token="<bos>", eos_token="<eos>"
    )
    tokenizer.chat_template = template
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    return text


@pytest.mark.parametrize("template", [GEMMA2, LLAMA3, LLAMA31, LINES])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_renders_what_transformers_renders(template: str, add_generation_prompt: bool) -> None:
    for messages in (TALK, TALK[:1]):
        got = render(template, messages, bos_token="<bos>", eos_token="<eos>", add_generation_prompt=add_generation_prompt)
        assert got == by_transformers(template, messages, add_generation_prompt)


def test_a_system_message_and_loop_controls() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "ignored", "content": "?"}, *TALK]
    got = render(LLAMA31, messages, bos_token="<bos>", eos_token="<eos>")
    assert got == by_transformers(LLAMA31, messages, True)
    assert "ignored" not in got
    assert datetime.now().strftime("%b %Y") in got


def test_gemma_in_full() -> None:
    assert render(GEMMA2, [{"role": "user", "content": " Hi "}], bos_token="<bos>", eos_token="<eos>") == (
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    )


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "not a list"),
        ("hello", "not a list"),
        (None, "not a list"),
        ([TALK[0], "hello"], "Message 2 is str"),
        ([TALK[0], {"role": "user"}], 'Message 2 has no "content"'),
        ([{"content": "x"}], 'Message 1 has no "role"'),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], 'Message 1 has a "content" that is list'),
        ([{"role": "user", "content": None}], 'Message 1 has a "content" that is NoneType'),
        ([{"role": "user", "content": "x", "tool_calls": []}], 'Message 1 has a "tool_calls" that is list'),
    ],
)
def test_the_wrong_message_is_named(messages: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        render(LLAMA3, messages, bos_token="<bos>", eos_token="<eos>")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (GEMMA2, r"^The chat template refused the messages: System role not supported\.$"),
        ("{% for %}", "^The chat template refused the messages: .+$"),
        ("{{ messages[0].content + 1 }}", "^The chat template refused the messages: .+$"),
        ("{{ missing.thing }}", "'missing' is undefined"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ raise_exception('two\nlines.') }}", r": two lines\.$"),
    ],
)
def test_a_refusal_is_one_sentence(template: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        render(template, [{"role": "system", "content": "x"}], bos_token="<bos>", eos_token="<eos>")
