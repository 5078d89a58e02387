"""Schemas of functions: what transformers' `get_json_schema` makes, and a sentence for what has none."""

import enum
from collections.abc import Callable
from typing import Any, Literal, Optional, Union

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionroute.runtime import InputError
from fusionroute.runtime.tool_schemas import schema_of


class Unit(enum.Enum):
    CELSIUS = "celsius"
    KELVIN = 1


HINTS = [
    int, float, str, bool, Any, None, list, tuple, dict, list[int], list[list[str]], dict[str, float], dict[str, list[int]], tuple[int, str],
    int | None, Optional[str], Union[int, str], int | str | None, list[int] | None, list[int] | dict, list | tuple, bool | Literal["a"],  # noqa: UP007, UP045
    Literal["a", "b"], Literal[1, "a", None], Unit, Unit | None, list[Unit], tuple[list[int], dict[str, Any]],
]  # fmt: skip


def of_transformers(function: Callable[..., Any]) -> dict[str, Any]:
    transformers: Any = pytest.importorskip("transformers", minversion="5.24")
    schema: dict[str, Any] = transformers.utils.get_json_schema(function)
    return schema


def weather(city: str, days: int = 3, *, unit: Literal["C", "F"] = "C", where: "Unit | None" = None) -> list[float]:
    """How warm it will be.

    It asks a station,
    which may take a while.

    Args:
        city: The city's name,
            as on a map: with its country.
        days (int, optional): For how many days.

        unit: Of the answer (choices: ["C ", "F"])
        where:
            On the next line.
        other: Is no argument.

    Returns:
        One temperature for each day.

    Raises:
        OSError: without a network.
    """
    raise NotImplementedError


def without_sections() -> None:
    """Says what it does."""


def without_a_result(x: float, *more: int, **named: str):  # type: ignore[no-untyped-def]
    """Args: in a sentence, Returns: too.

    Args:
      x: a
      y
      more: b (CHOICES: [1, 2])
      named: c
    """


def unknown_result(x: dict[str, Any] = {}) -> "Callable[..., Any]":  # noqa: B006
    """.

    Args:
        x: a: b
    Raises: nothing
    """
    raise NotImplementedError


class Station:
    def read(self, place: str) -> str:
        """Read it.

        Args:
            place: Where.
        """
        return place

    @classmethod
    def make(cls, place: str) -> "Station":
        """Make it.

        Args:
            place: Where.
        """
        return cls()


@pytest.mark.parametrize(
    "function", [weather, without_sections, without_a_result, unknown_result, Station.read, Station().read, Station.make]
)
def test_a_function_is_described_as_transformers_does(function: Callable[..., Any]) -> None:
    assert schema_of(function) == of_transformers(function)


@pytest.mark.parametrize("hint", HINTS)
def test_a_type_hint_is_what_it_is_in_transformers(hint: Any) -> None:
    def function(x, y=None):  # type: ignore[no-untyped-def]
        """Do.

        Args:
            x: one
            y: other
        """

    function.__annotations__ = {"x": hint, "y": hint, "return": hint}
    assert schema_of(function) == of_transformers(function)


words = st.lists(
    st.sampled_from(["a", "b:", "x: y", "(int)", "c (int): d", "  deep: er", "\n", "\n    ", " ", "Returns", "—"]), max_size=8
).map("".join)
lines = st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["x", "y", "z (int)", "plain words", ""]), words), max_size=6)


@settings(max_examples=200, deadline=None)
@given(words, lines, st.booleans(), words)
def test_any_docstring_is_read_as_transformers_reads_it(before: str, entries: list[tuple[int, str, str]], args: bool, after: str) -> None:
    def function(x: int, y: int) -> int:
        raise NotImplementedError

    section = "".join(f"{'  ' * depth}{name}{':' if name != 'plain words' else ''} {text}\n" for depth, name, text in entries)
    function.__doc__ = f"Do {before}\n\n{'Args:' if args else 'Notes:'}\n{section}\nReturns:\n    {after}"
    try:
        expected = of_transformers(function)
    except Exception:
        with pytest.raises(InputError):
            schema_of(function)
    else:
        assert schema_of(function) == expected


def no_docstring(x: int) -> None:
    raise NotImplementedError


def no_hint(x):  # type: ignore[no-untyped-def]
    """Do.

    Args:
        x: one
    """


def no_description(x: int) -> None:
    """Do."""


def no_schema(x: Station) -> None:
    """Do.

    Args:
        x: one
    """


def no_choices(x: int) -> None:
    """Do.

    Args:
        x: one (choices: a, b)
    """


def no_values(x: Literal[b"a"]) -> None:
    """Do.

    Args:
        x: one
    """


def no_name(x: "Nowhere") -> None:  # type: ignore[name-defined]  # noqa: F821
    """Do.

    Args:
        x: one
    """


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (no_docstring, "The tool no_docstring has no docstring, which must describe it and its arguments: write one, "),
        (no_hint, "The argument x of the tool no_hint has no type hint: add one, "),
        (no_description, "The docstring of the tool no_description has no line 'x: …' under 'Args:': add one, "),
        (no_schema, f"The argument x of the tool no_schema has no JSON schema (the type {Station!r}): change it, "),
        (no_choices, "The argument x of the tool no_choices has no JSON schema (Expecting value: line 1 column 1 (char 0)): change it, "),
        (no_values, "The argument x of the tool no_values has no JSON schema (the choice of [b'a']): change it, "),
        (no_name, "The type hints of the tool no_name cannot be read (name 'Nowhere' is not defined): mend them, "),
    ],
)
def test_what_a_schema_lacks_is_named(function: Callable[..., Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        schema_of(function)
    assert str(caught.value) == words + "or pass its JSON schema."
    with pytest.raises(Exception):  # noqa: B017
        of_transformers(function)
