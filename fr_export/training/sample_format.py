"""What one JSON value of a training file must look like. Every fault is named with its field."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

SFT_FORMS = (("messages",), ("prompt", "completion"))
PREFERENCE_FORMS = (("prompt", "chosen", "rejected"),)
ANSWERS = ("messages", "completion", "chosen", "rejected")  # the fields that are learnt from
Forms = tuple[tuple[str, ...], ...]

# role → the roles that may come before it; None is the beginning. A template writes nothing else.
_BEFORE: dict[str, tuple[str | None, ...]] = {
    "system": (None,),
    "user": (None, "system", "assistant"),
    "assistant": (None, "system", "user", "tool"),
    "tool": ("assistant", "tool"),
}


class Fault(NamedTuple):
    """What is wrong, and where in the sample: `messages[1].content`, empty for the whole of it."""

    field: str
    reason: str


def faults(sample: Any, forms: Forms) -> Iterator[Fault]:
    """Everything that is wrong with a sample of one of the forms, which are sets of fields. Other fields are ignored."""
    if not isinstance(sample, dict):
        yield Fault("", f"expected a JSON object, found {_kind(sample)}")
        return
    form = next((form for form in forms if all(field in sample for field in form)), None)
    if form is None:
        expected = " or ".join("{" + ", ".join(f'"{field}"' for field in form) + "}" for form in forms)
        yield Fault("", f"expected {expected}, found the fields {', '.join(sample) or 'none'}")
        return
    if form == ("messages",):
        yield from _conversation(sample, form)
    elif all(isinstance(sample[field], str) for field in form):
        for field in form:
            yield from _text(sample[field], field, field in ANSWERS)
    elif all(isinstance(sample[field], list) for field in form):
        for field in form[1:]:
            yield from _conversation(sample, ("prompt", field))
    else:
        kinds = ", ".join(f"{field} is {_kind(sample[field])}" for field in form)
        yield Fault("", f"expected texts alone or lists of messages alone, but {kinds}")


def _conversation(sample: Mapping[str, Any], fields: tuple[str, ...]) -> Iterator[Fault]:
    """The messages of some fields, one after the other. Those of a prompt are not learnt from."""
    before: str | None = None
    answers = 0
    for field in fields:
        messages = sample[field]
        if not isinstance(messages, list) or not messages:
            yield Fault(field, f"expected a list of messages, found {'an empty one' if messages == [] else _kind(messages)}")
            return
        for number, message in enumerate(messages):
            where = f"{field}[{number}]"
            if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
                found = f"one with {', '.join(message) or 'nothing'}" if isinstance(message, dict) else _kind(message)
                yield Fault(where, f'expected {{"role": …, "content": …}}, found {found}')
                return
            role, learnt = message["role"], field in ANSWERS and message["role"] == "assistant"
            if not isinstance(role, str) or role not in _BEFORE:
                yield Fault(f"{where}.role", f"expected {', '.join(_BEFORE)}, found {role!r}")
                return
            if before not in _BEFORE[role]:
                yield Fault(f"{where}.role", f"'{role}' comes after '{before}'" if before else f"'{role}' comes first")
            yield from _text(message["content"], f"{where}.content", learnt)
            before, answers = role, answers + learnt
    if not answers:
        yield Fault(fields[-1], "no message of the role 'assistant' to learn")


def _text(value: Any, field: str, learnt: bool) -> Iterator[Fault]:
    if not isinstance(value, str):
        yield Fault(field, f"expected a text, found {_kind(value)}")
    elif learnt and not value.strip():
        yield Fault(field, "is empty: there is nothing to learn")
    elif any("\ud800" <= sign <= "\udfff" for sign in value):
        yield Fault(field, "is not valid Unicode (half of a surrogate pair)")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")
