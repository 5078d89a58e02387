"""Tables that a terminal of any width can show: every figure whole, columns that do not fit in tables below the first."""

from collections.abc import Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fusionroute.runtime.errors import printable

Row = Sequence[str]
BESIDE = 2  # columns of the terminal that a column of the table takes beside its cells


def tables(
    console: Console, title: str, names: Sequence[str], values: Sequence[str], rows: Sequence[Row], styles: Sequence[str] | None = None
) -> list[Table]:
    """One table where it fits into the console's width, else several, which repeat the columns of `names`.

    Columns of `names` are words, aligned left, and are folded where they are very long; those of `values` are figures,
    aligned right, and never cut. A row has a cell for each of both; `styles` has a style for each row.
    """
    widths = [
        BESIDE + max(cell_len(line) for cell in column for line in cell.split("\n"))
        for column in zip((*names, *values), *rows, strict=True)
    ]
    name_widths = folded(widths[: len(names)], 2 * console.width // 3)  # so that figures have room beside long names
    room = console.width - sum(name_widths)
    parts: list[list[int]] = [[]]
    taken = 0
    for number, width in enumerate(widths[len(names) :]):
        if parts[-1] and taken + width > room:
            parts.append([])
            taken = 0
        parts[-1].append(number)
        taken += width
    return [part("" if index else title, names, values, rows, chosen, styles, name_widths) for index, chosen in enumerate(parts)]


def folded(widths: Sequence[int], room: int) -> list[int]:
    """Widths of columns that together fit into `room`: the widest are narrowed first."""
    narrowed = list(widths)
    while sum(narrowed) > room:
        narrowed[narrowed.index(max(narrowed))] -= 1
    return narrowed


def part(
    title: str,
    names: Sequence[str],
    values: Sequence[str],
    rows: Sequence[Row],
    chosen: Sequence[int],
    styles: Sequence[str] | None,
    name_widths: Sequence[int],
) -> Table:
    """The table of the `chosen` ones among the columns of values."""
    table = Table(
        title=Text(title, "italic") if title else None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    for name, width in zip(names, name_widths, strict=True):
        table.add_column(name, overflow="fold", max_width=width - BESIDE)
    for number in chosen:
        table.add_column(values[number], justify="right", no_wrap=True)
    for index, row in enumerate(rows):
        cells = [*row[: len(names)], *(row[len(names) + number] for number in chosen)]
        table.add_row(
            *(Text("\n".join(printable(line) for line in cell.split("\n"))) for cell in cells), style=styles[index] if styles else None
        )
    return table


def size(count: float | None) -> str:
    """Bytes for people: 512 B, 48.3 MB, 1.81 GB; a dash where unknown."""
    if count is None:
        return "–"
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}" if unit == 1e9 else f"{count / unit:.1f} {name}"
    return f"{count:.0f} B"
