"""Print a calibration table for people."""

from typing import Any

from rich.console import Console

from fusionroute.runtime.tables import tables


def show(console: Console, summary: dict[str, Any]) -> None:
    """Print a `Table.summary()`: one table of experts, and one per model with a line per matrix."""
    console.print(
        f"{summary['texts']} texts, {summary['tokens']:,} tokens, {summary['answered']:,} answered; identity {summary['identity'][:12]}"
    )
    shares = [(name, f"{share:.1%}") for name, share in summary["shares"].items()]
    console.print(*tables(console, "Who answered", ("expert",), ("share of answered positions",), shares))
    for model, matrices in summary["models"].items():
        rows = []
        for matrix, figures in matrices.items():
            ranges = [f"{figures[name]:.4g}" for name in ("absmax", "p99.99", "mse")]
            rows.append((matrix, f"{figures['rows']:,}", *ranges, "–" if figures["outliers"] is None else f"{figures['outliers']:.1f}"))
        console.print(*tables(console, model, ("matrix",), ("rows", "absmax", "p99.99", "mse range", "outlier ratio"), rows))
