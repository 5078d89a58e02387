"""Messages to text through the bundle's chat template, with the environment that templates are written for."""

import functools
import json
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from fusionroute.runtime.errors import InputError

if TYPE_CHECKING:
    from jinja2 import Template


def render(template: str, messages: list[dict[str, str]], *, bos_token: str, eos_token: str, add_generation_prompt: bool = True) -> str:
    """The text of a conversation: what the chat template makes of `messages`, its own special tokens included.

    Raises InputError where a message is not {"role": str, "content": str}, or where the template refuses the messages,
    or leaves its bounds: see `bounded_templates`.
    """
    from fusionroute.runtime.bounded_templates import MOST_SOURCE, run  # here: Jinja

    checked = _checked(messages)
    if len(template) > MOST_SOURCE:
        raise InputError(f"The chat template refused the messages: it has more than {MOST_SOURCE} characters.")
    values = {"messages": checked, "bos_token": bos_token, "eos_token": eos_token, "add_generation_prompt": add_generation_prompt}
    try:
        return run(lambda: _compiled(template).render(values))
    except Exception as error:  # a template is a program: whatever it raises is its way to refuse
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise InputError(f"The chat template refused the messages: {reason}.") from error


def _checked(messages: object) -> list[dict[str, str]]:
    """Plain copies, so that the template sees nothing but dicts of strings."""
    if not isinstance(messages, list) or not messages:
        raise InputError('The messages are not a list with at least one {"role": ..., "content": ...}.')
    copies = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise InputError(f'Message {number} is {type(message).__name__}, expected {{"role": ..., "content": ...}}.')
        for key in ("role", "content"):
            if key not in message:
                raise InputError(f'Message {number} has no "{key}": give it one, a str.')
        for key, value in message.items():
            if not isinstance(value, str):
                raise InputError(f'Message {number} has a "{key}" that is {type(value).__name__}, expected a str.')
        copies.append({str(key): str(value) for key, value in message.items()})
    return copies


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> "Template":
    from jinja2.exceptions import TemplateError
    from jinja2.ext import loopcontrols

    from fusionroute.runtime.bounded_templates import BoundedEnvironment, check_widths

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

    environment = BoundedEnvironment({"tojson": tojson}, trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment.from_string(template)
