"""What the stages of an export take, beside those of an earlier one: seconds, peak memory, and the quality of each
precision.

python -m benchmarks.export_speed --router SYSTEM/router --expert NAME=SYSTEM/experts/NAME … --out DIR [--before REPORT]

It exports with an empty cache, as a first export does: fp32, int8 and int4, calibrated and compared. REPORT is the
report.json of an earlier export of the same system on the same machine.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fusionroute.fr_export.commands.options import parse_experts
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.export import Request, export
from fusionroute.runtime.machine import cores, processor

FIGURES = {"perplexity": "perplexity_ratio", "KL": "kl_mean", "top-1": "greedy_agreement", "routing": "routing_agreement"}


def main(
    router: Annotated[str, typer.Option(help="Router checkpoint.")],
    expert: Annotated[list[str], typer.Option(help="NAME=SRC; repeat per expert.")],
    out: Annotated[Path, typer.Option(help="Folder of the bundle, which is replaced.")],
    precision: Annotated[str, typer.Option(help="Comma list.")] = "fp32,int8,int4",
    before: Annotated[Path | None, typer.Option(help="An earlier report.json.")] = None,
) -> None:
    """Export a system and print what each stage took."""
    stages = Stages(Console(stderr=True))
    request = Request(None, router, dict(parse_experts(expert)), tuple(precision.split(",")), ("ort:cpu",), out, force=True)
    with tempfile.TemporaryDirectory() as cache, stages.progress:
        os.environ["XDG_CACHE_HOME"] = cache
        report = export(request, stages)
    earlier = json.loads(before.read_text()) if before is not None else None
    console = Console(width=110)
    console.print(f"{processor()[0].partition(':')[2].strip()}, {cores()} cores")
    console.print(stage_table(report, earlier), quality_table(report, earlier))


def stage_table(report: dict[str, Any], earlier: dict[str, Any] | None) -> Table:
    """A row per stage, models together; the last row is the total."""
    table = Table("stage", "seconds before", "now", "times faster", "peak MiB before", "now")
    rows, old = grouped(report), grouped(earlier) if earlier else {}
    for name, (seconds, memory) in rows.items():
        if name in old:
            table.add_row(
                name, f"{old[name][0]:.1f}", f"{seconds:.1f}", f"{old[name][0] / seconds:.1f}", f"{old[name][1]:,.0f}", f"{memory:,.0f}"
            )
        else:
            table.add_row(name, "", f"{seconds:.1f}", "", "", f"{memory:,.0f}")
    return table


def grouped(report: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Stage → seconds and peak memory in MiB; "calibrating" and "comparing" are one stage each, "total" is the last."""
    rows: dict[str, tuple[float, float]] = {}
    for stage in report["stages"]:
        first = stage["name"].partition(" ")[0]
        name = first if first in ("calibrating", "comparing") else stage["name"]
        seconds, memory = rows.get(name, (0.0, 0.0))
        rows[name] = (seconds + stage["seconds"], max(memory, stage["peak_anonymous_mib"]))
    return rows | {"total": (sum(row[0] for row in rows.values()), max(row[1] for row in rows.values()))}


def quality_table(report: dict[str, Any], earlier: dict[str, Any] | None) -> Table:
    """A row per precision, read in chunks."""
    table = Table("precision", "bits", *FIGURES)
    for when, each in (("before", earlier), ("now", report)):
        for entry in each["variants"] if each else []:
            figures = entry["compared"]["chunks"]
            table.add_row(
                f"{entry['precision']}, {when}", f"{entry['bits_per_weight']:.2f}", *(f"{figures[key]:.4g}" for key in FIGURES.values())
            )
    return table


if __name__ == "__main__":
    typer.run(main)
