"""Messages to text through a chat template, with the environment that templates are written for: as transformers does it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn, TypedDict

from fusionroute.runtime.arguments import flag, shown
from fusionroute.runtime.chat_messages import REASONING, plain, plain_dicts, plain_messages, plain_tools
from fusionroute.runtime.errors import InputError

if TYPE_CHECKING:
    from jinja2 import Template
    from typing_extensions import Unpack

DEFAULT, TOOLS = "default", "tool_use"  # names of templates
OWN = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "template")  # not among other names
MARK = "CONTINUE_FINAL_MESSAGE_TAG "  # stands behind the text to continue while it is rendered


class ChatOptions(TypedDict, total=False):
    """What a template is given beside the messages; each is as in transformers' `apply_chat_template`.

    tools: functions, or their JSON schemas. documents: dicts, by custom with "title" and "text". add_generation_prompt: open an
    answer, which is the default unless the last message is continued. continue_final_message: leave the last message
    open, or the field of it that is named. chat_template_kwargs: more names for the template, such as enable_thinking.
    """

    tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None
    documents: list[dict[str, Any]] | None
    add_generation_prompt: bool | None
    continue_final_message: bool | str
    chat_template_kwargs: Mapping[str, Any] | None


@dataclass(frozen=True)
class ChatTemplates:
    """The chat templates of a bundle by name, and the special tokens that they write: name → text, as eos_token → </s>."""

    templates: Mapping[str, str]
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    def render(self, messages: object, **options: Unpack[ChatOptions]) -> str:
        """The text of a conversation, by the template for tools where there are both. Raises InputError, see `render`."""
        name = TOOLS if options.get("tools") is not None and TOOLS in self.templates else DEFAULT
        if name not in self.templates:
            raise InputError(
                f"The bundle has no default chat template, only {', '.join(sorted(self.templates))}: pass tools, or text or token ids."
            )
        names = {**self.special_tokens, **more_names(options.pop("chat_template_kwargs", None))}
        return render(self.templates[name], messages, **options, **names)


def render(
    template: str,
    messages: object,
    *,
    tools: object = None,
    documents: object = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool | str = False,
    **names: Any,
) -> str:
    """The text of a conversation: what the chat template makes of `messages`, its own special tokens included.

    names: what else the template reads: special tokens, such as eos_token="</s>", and more names.

    Raises InputError where messages or options are none, see `chat_messages` and `ChatOptions`, or where the template
    refuses them, or leaves its bounds: see `bounded_templates`.
    """
    from fusionroute.runtime.bounded_templates import run  # here: Jinja

    copies = plain_messages(messages)
    continued = continued_field(continue_final_message, template)
    opens = continued is None if add_generation_prompt is None else flag("add_generation_prompt", add_generation_prompt)
    if opens and continued is not None:
        raise InputError("continue_final_message leaves the last message open, and add_generation_prompt opens another: choose one.")
    end = None if continued is None else mark_end(copies[-1], continued)
    values = names | {
        "messages": copies,
        "tools": plain_tools(tools),
        "documents": plain_dicts("documents", documents),
        "add_generation_prompt": opens,
    }
    try:
        text = run(lambda: compiled(template).render(values))
    except Exception as error:  # a template is a program: whatever it raises is its way to refuse
        raise InputError(f"The chat template refused the messages: {one_sentence(error)}.") from error
    return text if end is None else before_mark(text, end)


def broken(template: str) -> str | None:
    """Why a template cannot be compiled, without a full stop; None where it can."""
    from fusionroute.runtime.bounded_templates import run

    try:
        run(lambda: compiled(template))
    except Exception as error:  # also RecursionError
        line = getattr(error, "lineno", None)
        return one_sentence(error) if line is None else f"line {line}: {one_sentence(error)}"
    return None


def one_sentence(error: Exception) -> str:
    """What a template raised, without a full stop."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def more_names(names: object) -> dict[str, Any]:
    """Copies of what a caller gives a template beside the rest. Raises InputError."""
    if names is None:
        return {}
    if not isinstance(names, Mapping):
        raise InputError(f"chat_template_kwargs is {shown(names)}, expected a dict of names and values.")
    copies: dict[str, Any] = plain("chat_template_kwargs", names)
    if taken := [name for name in OWN if name in copies]:
        raise InputError(
            f"chat_template_kwargs has {taken[0]!r}, which is no name of a template's own: pass it beside chat_template_kwargs."
        )
    return copies


def continued_field(asked: bool | str, template: str) -> str | None:
    """The field of the last message that is left open; None where it is closed. Raises InputError."""
    if not isinstance(asked, str) and not flag("continue_final_message", asked):
        return None
    name = asked if isinstance(asked, str) else "content"
    if not any(each in template for each in (REASONING if name in REASONING else (name,))):
        raise InputError(f"continue_final_message names {shown(name)}, which the chat template does not read.")
    return name


def mark_end(message: dict[str, Any], name: str) -> str:
    """Put a MARK behind the text of a message that is to be continued, and return that text. Raises InputError."""
    text = message.get(name)
    if isinstance(text, (list, tuple)):
        part = next((part for part in reversed(text) if isinstance(part, dict) and isinstance(part.get("text"), str)), None)
        if part is not None:
            end = str(part["text"])
            part["text"] = end + MARK
            return end
    if not isinstance(text, str):
        raise InputError(f"continue_final_message needs a text to continue, and the last message has none in {name!r}.")
    for copy in [each for each in REASONING if message.get(each) == text] if name in REASONING else [name]:
        message[copy] = text + MARK
    return text


def before_mark(text: str, end: str) -> str:
    """A rendered text up to its MARK; spaces before it stand where the template keeps them. Raises InputError without it."""
    place = text.rfind(MARK.strip())
    if place < 0 or end.strip() not in text:
        raise InputError("The chat template leaves the last message out or changes it, so it cannot be continued.")
    whole = text.startswith(MARK, place)
    return text[:place] if whole else text[:place].rstrip()


@functools.lru_cache(maxsize=8)
def compiled(template: str) -> Template:
    """A template in the environment that transformers gives it, within bounds. Raises what Jinja does, and SecurityError."""
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import loopcontrols

    from fusionroute.runtime.bounded_templates import MOST_SOURCE, BoundedEnvironment, check_widths
    from fusionroute.runtime.template_tags import Generation

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # jinja's own escapes for HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(pattern: str) -> str:
        check_widths(pattern)
        return datetime.now().strftime(pattern)

    if len(template) > MOST_SOURCE:
        raise SecurityError(f"it has more than {MOST_SOURCE} characters")
    environment = BoundedEnvironment({"tojson": tojson}, trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment.from_string(template)
