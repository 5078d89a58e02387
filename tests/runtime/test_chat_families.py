"""Templates with the constructs of common families, over conversations of any kind: the same text, or refused, as in transformers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from fusionroute.runtime.chat import ChatTemplates, broken, render
from fusionroute.runtime.errors import InputError

FOLDER = Path(__file__).parents[1] / "support" / "chat_templates"
FAMILIES = {file.stem: file.read_text() for file in sorted(FOLDER.glob("*.jinja"))}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["12+30=", " spaced \n", "<think>\nso\n</think>\n\n42", '"quoted" <b>&</b>', "/no_think", "👩‍🚀 漢字", "</s>", "{{ bos_token }}", ""]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts, lambda inner: st.lists(inner, max_size=2), max_leaves=3
)
arguments = st.dictionaries(texts, values, max_size=2)
parts = st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "image"])}, optional={"text": texts}), max_size=2)
calls = st.lists(
    st.fixed_dictionaries(
        {"function": st.fixed_dictionaries({"name": texts, "arguments": arguments | st.builds(json.dumps, arguments)})},
        optional={"type": st.just("function"), "id": st.sampled_from(["call00001", "short"])},
    ),
    min_size=1,
    max_size=2,
)
system = st.fixed_dictionaries({"role": st.just("system"), "content": texts})
user = st.fixed_dictionaries({"role": st.just("user"), "content": texts | parts}, optional={"name": texts})
assistant = st.fixed_dictionaries(
    {"role": st.just("assistant")},
    optional={
        "content": texts | parts | st.none(),
        "tool_calls": calls | st.none(),
        "reasoning": texts,
        "thinking": texts,
        "weight": st.integers(),
    },
)
answer = st.fixed_dictionaries(
    {"role": st.just("tool"), "content": texts | arguments | st.floats()}, optional={"tool_call_id": st.just("call00001"), "name": texts}
)
ordinary = st.builds(
    lambda first, turns, last: [*first, *(message for turn in turns for message in turn), *last],
    st.lists(system, max_size=1),
    st.lists(st.tuples(user, assistant) | st.tuples(user, assistant, answer, assistant), max_size=2),
    st.lists(user, max_size=1),
)
conversations = ordinary.filter(bool) | st.lists(system | user | assistant | answer, min_size=1, max_size=5)
kinds = st.fixed_dictionaries(
    {"type": st.sampled_from(["string", "number", "array", "object", "null", ["string", "integer"]])}, optional={"description": texts}
)
schemas = st.fixed_dictionaries({"type": st.just("object"), "properties": st.dictionaries(texts, kinds, max_size=2)})
functions = st.fixed_dictionaries({"name": texts, "description": texts, "parameters": schemas}, optional={"return": kinds})
tools = st.none() | st.lists(st.builds(lambda function: {"type": "function", "function": function}, functions), max_size=2)
documents = st.none() | st.lists(st.fixed_dictionaries({"title": texts, "text": texts}), max_size=2)
names = st.fixed_dictionaries({}, optional={"enable_thinking": st.booleans(), "tools_in_user_message": st.booleans(), "date_string": texts})


def by_transformers(templates: str | dict[str, str], messages: Sequence[Any], **options: Any) -> str | None:
    """The text that transformers makes, None where it refuses."""
    transformers: Any = pytest.importorskip("transformers", minversion="5.24")
    tokenizers: Any = pytest.importorskip("tokenizers")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()), **SPECIAL)
    tokenizer.chat_template = templates
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception:
        return None
    return text


def by_runtime(templates: str | dict[str, str], messages: Sequence[Any], **options: Any) -> str | None:
    """The text that the runtime makes, None where it refuses."""
    known = ("tools", "documents", "add_generation_prompt", "continue_final_message")
    options["chat_template_kwargs"] = {name: options.pop(name) for name in list(options) if name not in known}
    try:
        return ChatTemplates({"default": templates} if isinstance(templates, str) else templates, SPECIAL).render(messages, **options)
    except InputError:
        return None


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(messages=conversations, tools=tools, documents=documents, names=names, generate=st.booleans())
def test_every_conversation_is_what_transformers_makes_of_it(
    family: str, messages: list[dict[str, Any]], tools: Any, documents: Any, names: dict[str, Any], generate: bool
) -> None:
    options = {"tools": tools, "documents": documents, "add_generation_prompt": generate, **names}
    assert by_runtime(FAMILIES[family], messages, **options) == by_transformers(FAMILIES[family], messages, **options)


@pytest.mark.parametrize("family", ["chatml", "gemma3", "qwen3", "smollm3", "mistral_v3"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(messages=conversations, field=st.sampled_from([True, "content", "thinking", "reasoning_content"]))
def test_a_last_message_is_continued_as_transformers_does(family: str, messages: list[dict[str, Any]], field: bool | str) -> None:
    expected = by_transformers(FAMILIES[family], messages, continue_final_message=field)
    assert by_runtime(FAMILIES[family], messages, continue_final_message=field) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_an_ordinary_conversation_is_rendered(family: str) -> None:
    assert broken(FAMILIES[family]) is None
    messages = [{"role": "user", "content": "12+30="}, {"role": "assistant", "content": "42"}, {"role": "user", "content": "And 12-30?"}]
    text = by_runtime(FAMILIES[family], messages)
    assert text is not None and text.index("12+30=") < text.index("42") < text.index("And 12-30?")
    assert text == by_transformers(FAMILIES[family], messages, add_generation_prompt=True)


@pytest.mark.parametrize("templates", [{"default": "D{{ tools }}", "tool_use": "T{{ tools }}", "rag": "R"}, {"default": "D{{ tools }}"}])
@pytest.mark.parametrize("tools", [None, [], [{"name": "f"}]])
def test_named_templates_are_chosen_as_transformers_does(templates: dict[str, str], tools: Any) -> None:
    messages = [{"role": "user", "content": "x"}]
    assert by_runtime(templates, messages, tools=tools) == by_transformers(templates, messages, tools=tools) is not None


def sum_of(numbers: list[float]) -> float:
    """Add numbers.

    Args:
        numbers: What to add.
    """
    return sum(numbers)


class Call(BaseModel):
    type: str = "function"
    function: dict[str, Any]


class Message(BaseModel):
    """As OpenAI's client gives one."""

    role: str
    content: str | None = None
    tool_calls: list[Call] | None = None


@dataclass
class Turn:
    role: str
    content: str | list[Message]
    name: str | None = None


@pytest.mark.parametrize("family", FAMILIES)
def test_functions_models_and_dataclasses_are_what_transformers_makes_of_them(family: str) -> None:
    """Tools that are functions, and messages that are no dicts, with objects in them."""
    asked, called = (
        Turn("user", "1+2="),
        Message(role="assistant", tool_calls=[Call(function={"name": "sum_of", "arguments": {"numbers": [1, 2]}})]),
    )
    told = {"role": "tool", "content": "3", "tool_call_id": "call00001"}
    for messages in ([asked], [asked, Message(role="assistant", content="3"), asked], [asked, called, told]):
        expected = by_transformers(FAMILIES[family], messages, tools=[sum_of], add_generation_prompt=True)
        assert by_runtime(FAMILIES[family], messages, tools=[sum_of]) == expected
        assert messages[1:] or expected is not None


def test_a_model_that_cannot_be_read_is_named() -> None:
    class Broken(Message):
        def model_dump(self, **options: Any) -> dict[str, Any]:
            raise RuntimeError("no")

    with pytest.raises(InputError) as caught:
        render("{{ messages }}", [Broken(role="user")])
    assert str(caught.value) == "Broken cannot be read by its model_dump (no): pass a dict."
    with pytest.raises(InputError, match=r"^Message 1 is ModelMetaclass, expected "):
        render("{{ messages }}", [Message])


def test_without_a_default_template() -> None:
    templates = ChatTemplates({"tool_use": "T", "rag": "R"})
    assert templates.render([{"role": "user", "content": "x"}], tools=[]) == "T"
    with pytest.raises(InputError) as caught:
        templates.render([{"role": "user", "content": "x"}])
    assert str(caught.value) == "The bundle has no default chat template, only rag, tool_use: pass tools, or text or token ids."


def test_a_template_gets_only_what_it_is_given() -> None:
    template = "{{ tools is none }} {{ documents is none }} {{ bos_token is defined }} {{ add_generation_prompt }} {{ x }}"
    assert render(template, [{"role": "user", "content": "x"}], x=3) == "True True False True 3"
