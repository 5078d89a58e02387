"""Chat templates in bounds: so many steps and seconds, no large value, and not many of them.

A template is a program that came with the bundle. Jinja's sandbox keeps it from the machine, but not from running for
ever or taking all memory: loops in loops, powers, padding, texts and lists that double. Each step of a template is a
line of the Python that Jinja makes of it. What one step can make is limited by leaving out what makes much of little
(such as `center`, `xmlattr` or `str.ljust`), and by a look at the sizes that go into the rest.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from types import FrameType
from typing import Any, TypeVar

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MOST_SOURCE = 1 << 18  # characters of a template: the longest of common families has 20,000
MOST_TEXT = 1 << 23  # characters of any text, of the texts in any list, and of all output
MOST_ITEMS = 1 << 18  # values in any list, those of lists in it included
MOST_MADE = 1 << 27  # characters and items that a template makes altogether
MOST_BITS = 4096  # of any whole number
MOST_STEPS = 1_000_000
MOST_SECONDS = 10.0
MOST_PADDING = 64  # characters that an indentation may add to each line
FILTERS = frozenset((  # those whose results are no larger than what goes in, and those that `check_filter` looks at
    "abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "format", "groupby", "indent",
    "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace", "reverse", "round",
    "safe", "select", "selectattr", "sort", "string", "title", "tojson", "trim", "unique", "upper",
))  # fmt: skip
PADDING = frozenset(("center", "encode", "expandtabs", "format_map", "ljust", "rjust", "to_bytes", "translate", "zfill"))  # methods
WIDE = re.compile(r"[0-9]{3,}|\*|\{[^}]*\{")  # in a format: a width that pads much, or that is given elsewhere
MADE = threading.local()  # `size`: of what the template that runs in this thread has made
T = TypeVar("T")


class Measuring(CodeGenerator):
    """Lets the environment look at what literals, slices and `~` make."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """As Jinja's, through `BoundedEnvironment.concatenated`."""
        self.write("environment.concatenated((")
        for each in node.nodes:
            self.visit(each, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        """See the class."""
        self._measured(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        """See the class."""
        self._measured(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        """See the class. Tuples of names to assign to are no values."""
        if node.ctx == "load":
            self._measured(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        """See the class."""
        if isinstance(node.arg, nodes.Slice):
            self._measured(super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def _measured(self, visit: Callable[[Any, Frame], None], node: nodes.Node, frame: Frame) -> None:
        self.write("environment.measured(")
        visit(node, frame)
        self.write(")")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Raises SecurityError where a template would leave its bounds."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    code_generator_class = Measuring

    def __init__(self, filters: dict[str, Callable[..., Any]], **options: Any):
        """filters: those that take the place of Jinja's."""
        super().__init__(finalize=shown, **options)
        self.filters = {name: bounded(name, each) for name, each in (self.filters | filters).items() if name in FILTERS}
        self.globals = {name: each for name, each in self.globals.items() if name != "lipsum"}
        self.measured = measured

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """Join the pieces of a block or of the output."""
        total, texts = 0, []
        for piece in pieces:
            total += len(piece)
            within(total, MOST_TEXT, "characters of text")
            texts.append(piece)
        joined: str = measured("".join(texts))
        return joined

    def concatenated(self, values: Iterable[Any]) -> str:
        """What `~` makes."""
        return self.concat(str(shown(value)) for value in values)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """See `jinja2.sandbox`."""
        if operator == "%" and isinstance(left, str):
            check_format(left, "%", right)
        elif operator == "*":
            many, count = (left, right) if isinstance(left, (str, list, tuple)) else (right, left)
            if isinstance(many, (str, list, tuple)) and isinstance(count, int):
                within(weight(many) * count, MOST_TEXT if isinstance(many, str) else MOST_ITEMS, "items or characters")
            elif isinstance(left, int) and isinstance(right, int):
                within(left.bit_length() + right.bit_length(), MOST_BITS, "bits of a number")
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            within(left.bit_length() * abs(right), MOST_BITS, "bits of a number")
        return measured(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """See `jinja2.sandbox`."""
        return attr not in PADDING and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """See `jinja2.sandbox`."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def look(*args: Any, **kwargs: Any) -> str:
            check_format(value.__self__, "{", (*args, *kwargs.values()))
            formatted: str = wrapped(*args, **kwargs)
            return formatted

        return look

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        """See `jinja2.sandbox`."""
        text, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(text, str) and name in ("replace", "join") and args:
            check_filter(name, (text, *args) if name == "replace" else (args[0], text), kwargs)
        return measured(super().call(context, function, *args, **kwargs))


def bounded(name: str, apply: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that looks at what goes in and comes out. What gives one value after another is made a list: iterators of
    iterators have no bound.
    """
    takes_more = hasattr(apply, "jinja_pass_arg")

    def look(*arguments: Any, **named: Any) -> Any:
        check_filter(name, arguments[1:] if takes_more else arguments, named)
        result = apply(*arguments, **named)
        return measured(list(islice(result, MOST_ITEMS + 1)) if isinstance(result, Iterator) else result)

    if takes_more:
        look.jinja_pass_arg = apply.jinja_pass_arg  # type: ignore[attr-defined]
    return look


def within(size: int, most: int, what: str) -> None:
    """Raise SecurityError for too large a size."""
    if size > most:
        raise SecurityError(f"it makes more than {most} {what}")


def weight(value: Any) -> int:
    """Characters and items of a value, those of lists in lists included. Raises SecurityError where they are too many."""
    if isinstance(value, str):
        within(len(value), MOST_TEXT, "characters of text")
        return len(value)
    characters, count, waiting = 0, 0, [value]
    while waiting:
        each = waiting.pop()
        count += 1
        within(count, MOST_ITEMS, "items")
        if isinstance(each, str):
            characters += len(each)
            within(characters, MOST_TEXT, "characters of text")
        elif isinstance(each, (list, tuple, set, frozenset)):
            within(len(each) + len(waiting), MOST_ITEMS, "items")
            waiting.extend(each)
        elif isinstance(each, dict):
            within(2 * len(each) + len(waiting), MOST_ITEMS, "items")
            waiting.extend((*each.keys(), *each.values()))
        elif isinstance(each, Namespace):
            waiting.append(object.__getattribute__(each, "_Namespace__attrs"))
    return characters + count


def measured(value: Any) -> Any:
    """A value that a step has made."""
    if isinstance(value, int):
        within(value.bit_length(), MOST_BITS, "bits of a number")
    MADE.size = getattr(MADE, "size", 0) + weight(value)
    within(MADE.size, MOST_MADE, "characters and items altogether")
    return value


def shown(value: Any) -> Any:
    """A value that becomes text."""
    weight(value)
    return value


def check_format(text: str, mark: str, values: Any) -> None:
    """Refuse formats that pad much, or that repeat much. mark: begins what is filled in."""
    check_widths(text)
    within(len(text) + text.count(mark) * weight(values), MOST_TEXT, "characters of text")


def check_widths(text: str) -> None:
    """Refuse formats that pad much."""
    if WIDE.search(text):
        raise SecurityError("a format pads to 100 characters or more, or to a width that is given elsewhere")


def check_filter(name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Refuse a filter whose result would be too long. arguments: what it is applied to, and its own."""
    given = [*arguments[1:], *named.values()]
    if name == "replace" and len(given) >= 2:
        text, old, new = str(shown(arguments[0])), str(shown(given[0])), str(shown(given[1]))
        within(len(text) + text.count(old) * len(new), MOST_TEXT, "characters of text")
    elif name == "join" and arguments:
        separator = given[0] if given and isinstance(given[0], str) else ""
        within(weight(arguments[0]) + len(separator) * len(arguments[0]), MOST_TEXT, "characters of text")
    elif name == "format":
        check_format(str(arguments[0]), "%", given)
    elif name in ("indent", "tojson", "round"):
        width = max((each if isinstance(each, int) else weight(each) for each in given), default=0)
        within(width, MOST_PADDING, "characters of padding")
        lines = weight(arguments[0]) if name == "tojson" else str(arguments[0]).count("\n")
        within(lines * width, MOST_TEXT, "characters of text")


def run(work: Callable[[], T]) -> T:
    """What `work` renders or compiles, in so many steps and seconds. Raises SecurityError beyond them, and what `work` raises."""
    steps, end, before = 0, time.monotonic() + MOST_SECONDS, sys.gettrace()
    MADE.size = 0

    def step(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal steps
        if time.monotonic() > end:
            raise SecurityError(f"it takes more than {MOST_SECONDS:g} seconds")
        if frame.f_code.co_filename != "<template>":  # of Jinja: only its calls are seen
            return None
        steps += 1
        within(steps, MOST_STEPS, "steps")
        return step

    sys.settrace(step)
    try:
        return work()
    finally:
        sys.settrace(before)
