"""Chat templates: what transformers renders is what the runtime renders."""

import copy
from datetime import datetime
from typing import Any

import pytest

from fusionroute.runtime.chat import ChatTemplates, broken, render
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


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


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
        ([{"content": "x"}], 'Message 1 has no "role"'),
        ([{"role": None, "content": "x"}], 'Message 1 has no "role"'),
        ([{"role": "user", "content": b"x"}], r"^Message 1\.content is b'x', expected what JSON has: a str, a number, .+ or a dict\.$"),
        ([{"role": "user", "content": [{"type": "image", "image": object}]}], r"^Message 1\.content\[0\]\.image is <class 'object'>, "),
        ([{"role": "user", "content": "x", 3: "x"}], r"^Message 1 has the key 3, expected a str\.$"),
        ([{"role": "user", "content": nested(65)}], r" is nested more than 64 deep: make it flatter\.$"),
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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tools": "f"}, "tools is 'f', expected a list of dicts, or None."),
        ({"tools": [len]}, "tools[0] is <built-in function len>, expected a dict with a JSON schema, or a function with type hints."),
        ({"documents": [{"text": "x"}, "y"]}, "documents[1] is 'y', expected a dict."),
        ({"documents": {"text": "x"}}, "documents is {'text': 'x'}, expected a list of dicts, or None."),
        ({"add_generation_prompt": "yes"}, "add_generation_prompt is 'yes', expected True or False."),
        ({"continue_final_message": 1}, "continue_final_message is 1, expected True or False."),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message leaves the last message open, and add_generation_prompt opens another: choose one.",
        ),
        ({"continue_final_message": "thoughts"}, "continue_final_message names 'thoughts', which the chat template does not read."),
        (
            {"continue_final_message": "role_description"},
            "continue_final_message needs a text to continue, and the last message has none in 'role_description'.",
        ),
    ],
)
def test_the_wrong_option_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        render("{{ messages[0].content }}{{ messages[0].role_description }}", [{"role": "user", "content": "x"}], **options)
    assert str(caught.value) == words


def test_a_message_that_the_template_drops_cannot_be_continued() -> None:
    with pytest.raises(InputError) as caught:
        render("{{ messages[0].content[:3] }}", [{"role": "assistant", "content": "hello"}], continue_final_message=True)
    assert str(caught.value) == "The chat template leaves the last message out or changes it, so it cannot be continued."


@pytest.mark.parametrize("name", ["messages", "tools", "documents", "add_generation_prompt", "continue_final_message"])
def test_names_of_options_are_no_more_names(name: str) -> None:
    with pytest.raises(InputError) as caught:
        ChatTemplates({"default": "x"}).render(TALK, chat_template_kwargs={name: 1})
    assert (
        str(caught.value)
        == f"chat_template_kwargs has {name!r}, which is no name of a template's own: pass it beside chat_template_kwargs."
    )


def test_messages_stay_as_they_are() -> None:
    message = {"role": "assistant", "content": [{"type": "text", "text": "x"}], "reasoning": "y", "tool_calls": None}
    before = copy.deepcopy(message)
    assert render("{{ messages[0].content[0].text }}", [message], continue_final_message=True) == "x"
    assert message == before


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ bos_token }}\n{% for m in messages %}", "line 2: Unexpected end of template"),
        ("{{ messages | nothing }}", "line 1: No filter named 'nothing'"),
        ("{% generation %}x", "line 1: Unexpected end of template"),
        ("x" * 262145, "it has more than 262144 characters"),
        ("{{ messages }}", None),
    ],
)
def test_why_a_template_cannot_be_compiled(template: str, reason: str | None) -> None:
    assert (broken(template) or "").startswith(reason or "") and (broken(template) is None) == (reason is None)
