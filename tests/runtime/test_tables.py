"""Tables in a terminal of any width: no figure is cut, and no line is longer than the terminal."""

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from fusionroute.runtime.tables import size, tables

FIGURE = st.integers(-(10**9), 10**9).map(lambda value: f"{value:,}")


def shown(width: int, names: list[str], values: list[str], rows: list[list[str]]) -> list[str]:
    file = io.StringIO()
    console = Console(file=file, width=width)
    console.print(*tables(console, "Title", names, values, rows))
    return file.getvalue().splitlines()


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.data(), st.integers(40, 200), st.integers(1, 3), st.integers(1, 14), st.integers(1, 4))
def test_every_figure_is_whole_and_every_line_fits(data: st.DataObject, width: int, names: int, values: int, count: int) -> None:
    words = st.text("abcdefgh-/", min_size=1, max_size=60)
    rows = [[*(data.draw(words) for _ in range(names)), *(data.draw(FIGURE) for _ in range(values))] for _ in range(count)]
    lines = shown(width, [f"name{i}" for i in range(names)], [f"value {i}" for i in range(values)], rows)
    assert max(map(len, lines)) <= width
    cells = [cell for line in lines for cell in line.split()]
    for row in rows:
        for figure in row[names:]:
            assert figure in cells
    assert not any("…" in line for line in lines)


def test_one_table_where_it_fits_and_else_the_names_again() -> None:
    rows = [["fp32", *("1,234.5" for _ in range(8))]]
    values = [f"value {i}" for i in range(8)]
    wide, narrow = shown(120, ["precision"], values, rows), shown(60, ["precision"], values, rows)
    assert sum("precision" in line for line in wide) == 1 and sum("precision" in line for line in narrow) == 2
    assert sum(line.startswith("Title") for line in narrow) == 1
    assert [word for line in narrow if "value" in line for word in line.replace("value ", "value").split() if word != "precision"] == [
        value.replace(" ", "") for value in values
    ]


def test_brackets_in_a_name_are_no_markup() -> None:
    assert any("[red]a" in line for line in shown(80, ["name"], ["value"], [["[red]a", "1"]]))


@pytest.mark.parametrize(
    ("count", "text"), [(None, "–"), (512, "512 B"), (48_300, "48.3 kB"), (483_787_704, "483.8 MB"), (1_813_857_592, "1.81 GB")]
)
def test_sizes(count: int | None, text: str) -> None:
    assert size(count) == text
