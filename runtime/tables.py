"""Tables that a terminal of any width can show: every figure whole, columns that do not fit in tables below the first."""

from collections.abc import Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

Row = Sequence[str]
BESIDE = 2  # columns of the terminal that a column of the table takes beside its cells


def tables(
    console: Console, title: str, names: Sequence[str], values: Sequence[str], rows: Sequence[Row], styles: Sequence[str] | None = None
) -> list[Table]:
    """One table where it fits into the console's width, else several, which repeat the columns of `names`.

    Columns of `names` are words, aligned left, and are folded where they are very long; those of `values` are figures,
    aligned right, and never cut. A row has a cell for each of both; `styles` has a style for each row.
    """
    longest = 3 * console.width // (5 * len(names)) - BESIDE  # of a name, so that figures have room beside it
    widths = [
        BESIDE + max(cell_len(line) for cell in column for line in cell.split("\n"))
        for column in zip((*names, *values), *rows, strict=True)
    ]
    room = console.width - sum(min(width, longest + BESIDE) for width in widths[: len(names)])
    parts: list[list[int]] = [[]]
    taken = 0
    for number, width in enumerate(widths[len(names) :]):
        if parts[-1] and taken + width > room:
            parts.append([])
            taken = 0
        parts[-1].append(number)
        taken += width
    return [part("" if index else title, names, values, rows, chosen, styles, longest) for index, chosen in enumerate(parts)]


def part(
    title: str,
    names: Sequence[str],
    values: Sequence[str],
    rows: Sequence[Row],
    chosen: Sequence[int],
    styles: Sequence[str] | None,
    longest: int,
) -> Table:
    """The table of the `chosen` ones among the columns of values."""
    table = Table(
        title=Text(title, "italic") if title else None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    for name in names:
        table.add_column(name, overflow="fold", max_width=longest)
    for number in chosen:
        table.add_column(values[number], justify="right", no_wrap=True)
    for index, row in enumerate(rows):
        cells = [*row[: len(names)], *(row[len(names) + number] for number in chosen)]
        table.add_row(*map(Text, cells), style=styles[index] if styles else None)
    return table


def size(count: float | None) -> str:
    """Bytes for people: 512 B, 48.3 MB, 1.81 GB; a dash where unknown."""
    if count is None:
        return "–"
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}" if unit == 1e9 else f"{count / unit:.1f} {name}"
    return f"{count:.0f} B"
