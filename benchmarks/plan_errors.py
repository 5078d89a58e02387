"""How far `fusionroute plan` is from what others measured, each device left out of the fit in its turn.

python -m benchmarks.plan_errors [--picture docs/plan.png] [--json]

Rows whose source does not say how the head is stored, so that their bytes are not known within a quarter, are listed
and drawn as lines, and neither fitted to nor counted.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from fusionroute.runtime.bench.figure import library
from fusionroute.runtime.plan.efficiency import fitted, left_out_errors
from fusionroute.runtime.plan.measurements import Measurement, measurements
from fusionroute.runtime.tables import tables

MARKS = {"int4": "o", "nvfp4": "s", "int8": "^", "fp16": "D"}
LIMIT = 0.35


def main(
    picture: Annotated[Path | None, typer.Option(help="Draw the estimates beside the measurements into this PNG file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare estimates with measurements."""
    rows = measurements()
    counted = [row for row in rows if row.sure]
    errors = left_out_errors(counted)
    unsure = [row for row in rows if not row.sure]
    result = summary(counted, errors, unsure)
    if picture is not None:
        draw(counted, errors, unsure, picture)
    if as_json:
        print(json.dumps(result, indent=1))
        return
    console = Console()
    cells = [
        (row.device, row.model, row.precision, f"{row.decode:g}", f"{row.decode * (1 + error):.3g}", f"{error:+.0%}")
        for row, error in zip(counted, errors, strict=True)
    ]
    console.print(
        *tables(console, "Decoded tokens per second", ("device", "model", "precision"), ("measured", "estimated", "error"), cells)
    )
    spans = [(row.device, row.model, f"{row.decode:g}", " to ".join(f"{speed:.3g}" for speed in span(row))) for row in unsure]
    console.print(
        *tables(console, "Not counted: how the head is stored is not said", ("device", "model"), ("measured", "estimated"), spans)
    )
    console.print(
        f"{len(errors)} rows on {len({row.device for row in counted})} devices: median {result['median']:.1%}, worst {result['worst']:.1%}"
    )
    every = result["of_all_rows"]
    console.print(
        f"With the rows that are not counted, at the middle of their bytes: median {every['median']:.1%}, worst {every['worst']:.1%}"
    )


def summary(counted: Sequence[Measurement], errors: list[float], unsure: Sequence[Measurement]) -> dict[str, Any]:
    """What `--json` prints."""
    sizes = np.abs(errors)
    return {
        "median": float(np.median(sizes)),
        "worst": float(sizes.max()),
        "of_all_rows": errors_of_all(counted, unsure),
        "rows": [
            {
                "device": row.device,
                "model": row.model,
                "precision": row.precision,
                "measured": row.decode,
                "error": error,
                "source": row.url,
            }
            for row, error in zip(counted, errors, strict=True)
        ],
        "not_counted": [
            {"device": row.device, "model": row.model, "measured": row.decode, "estimated": span(row), "source": row.url} for row in unsure
        ],
    }


def errors_of_all(counted: Sequence[Measurement], unsure: Sequence[Measurement]) -> dict[str, float]:
    """With the rows whose bytes are not known, at the middle of what they may be: median and worst error."""
    sizes = np.abs(left_out_errors([*counted, *unsure]))
    return {"median": float(np.median(sizes)), "worst": float(sizes.max())}


def span(row: Measurement) -> list[float]:
    """Tokens per second for the most and the fewest bytes that a row may stand for."""
    fit = fitted([other for other in measurements() if other.sure])
    return sorted(1 / fit.seconds(row.work._replace(read=size)) for size in row.bytes)


def draw(counted: Sequence[Measurement], errors: list[float], unsure: Sequence[Measurement], path: Path) -> None:
    """Estimates over measurements, both logarithmic, a colour for each device."""
    figure = library()(figsize=(8, 6.5), layout="constrained")
    axes = figure.subplots()
    ends = np.array([5.0, 400.0])
    axes.plot(ends, ends, color="black", linewidth=0.8)
    axes.fill_between(ends, ends * (1 - LIMIT), ends * (1 + LIMIT), color="#e8ebee", zorder=0, label=f"within {LIMIT:.0%}")
    axes.fill_between(ends, ends * 0.85, ends * 1.15, color="#cfd6dc", zorder=0, label="within 15%")
    names = list(dict.fromkeys(row.device for row in counted))
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    for row, error in zip(counted, errors, strict=True):
        axes.plot(row.decode, row.decode * (1 + error), MARKS[row.precision], color=colours[row.device], markersize=6, alpha=0.85)
    for name in names:
        axes.plot([], [], "o", color=colours[name], label=name)
    for precision, mark in MARKS.items():
        axes.plot([], [], mark, color="grey", label=precision)
    for number, row in enumerate(unsure):
        axes.plot([row.decode] * 2, span(row), color="grey", linewidth=1.2, alpha=0.7, label="" if number else "bytes not known")
    axes.set(
        xscale="log",
        yscale="log",
        xlim=ends,
        ylim=ends,
        xlabel="measured tokens/s",
        ylabel="estimated tokens/s, the device left out of the fit",
    )
    axes.legend(fontsize=7, ncols=2, loc="upper left")
    figure.savefig(path, dpi=110)


COLOURS = (
    "#3b6fb6",
    "#d1793b",
    "#4a9d6b",
    "#8a5fb0",
    "#b5485d",
    "#7a7a7a",
    "#2aa3a3",
    "#a8923a",
    "#d16ba5",
    "#5c4033",
    "#76b7e5",
    "#e3b04b",
    "#7fb069",
    "#c3a0e0",
    "#e08a8a",
)


if __name__ == "__main__":
    typer.run(main)
