"""Print a calibration table for people."""

from typing import Any

from rich.console import Console
from rich.table import Table


def show(console: Console, summary: dict[str, Any]) -> None:
    """Print a `Table.summary()`: one table of experts, and one per model with a line per matrix."""
    console.print(
        f"{summary['texts']} texts, {summary['tokens']:,} tokens, {summary['answered']:,} answered; identity {summary['identity'][:12]}"
    )
    experts = grid("Who answered", "expert", "share of answered positions")
    for name, share in summary["shares"].items():
        experts.add_row(name, f"{share:.1%}")
    console.print(experts)
    for model, matrices in summary["models"].items():
        table = grid(model, "matrix", "rows", "absmax", "p99.99", "mse range", "outlier ratio")
        for matrix, figures in matrices.items():
            ranges = [f"{figures[name]:.4g}" for name in ("absmax", "p99.99", "mse")]
            ratio = "" if figures["outliers"] is None else f"{figures['outliers']:.1f}"
            table.add_row(matrix, f"{figures['rows']:,}", *ranges, ratio)
        console.print(table)


def grid(title: str, first: str, *others: str) -> Table:
    """A table whose first column holds names, and all others numbers."""
    table = Table(title=title, title_justify="left")
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right")
    return table
