"""What `fusionroute train --check-data` prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from fusionroute.runtime.errors import InputError
from fusionroute.runtime.terminal import Terminal

if TYPE_CHECKING:
    from fusionroute.fr_export.training.check_data import FileSummary

LISTED = 20  # problems, duplicates and long rows of a file that are listed one by one


def show_data(summaries: Sequence[FileSummary], as_json: bool) -> None:
    """Print problems and a table, or JSON. Raises InputError where a file has problems."""
    if as_json:
        print(json.dumps([summary.as_json() for summary in summaries]), flush=True)
    else:
        console = Terminal(soft_wrap=True)
        for summary in summaries:
            for line in described(summary):
                console.print(line, markup=False)
        table = Table("", "samples", "tokens: mean", "median", "95 %", "most", "learnt: mean", "most", box=box.SIMPLE_HEAD, pad_edge=False)
        for summary in summaries:
            learnt = f"{summary.learnt[0]:g}", f"{summary.learnt[3]:g}"
            table.add_row(summary.kind, str(summary.samples), *(f"{value:g}" for value in summary.tokens), *learnt)
        console.print(table)
    wrong = {summary.file: len({problem.split(":")[0] for problem in summary.problems}) for summary in summaries if summary.problems}
    if wrong:
        lines = ", ".join(f"{count} {'line' if count == 1 else 'lines'} of {file}" for file, count in wrong.items())
        raise InputError(f"{lines} cannot be learnt from: mend or remove them.")


def described(summary: FileSummary) -> list[str]:
    """One line for each problem, duplicate and row that is too long, at most LISTED of each."""
    duplicates = [f"{line}: repeats line {earlier} (a warning)" for line, earlier in summary.duplicates]
    too_long = [f"{line}: longer than {summary.limit} tokens, so it will be skipped (a warning)" for line in summary.too_long]
    lines = []
    for what, texts in (("problems", summary.problems), ("duplicates", duplicates), ("long rows", too_long)):
        lines += [f"{summary.file}:{text}" for text in texts[:LISTED]]
        if len(texts) > LISTED:
            lines.append(f"{summary.file}: {len(texts) - LISTED} more {what}")
    return lines
