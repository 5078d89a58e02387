"""The figures as one HTML page that loads nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fusionroute.runtime.bench.figure import svg
from fusionroute.runtime.bench.table import COLUMNS, SIZES, cells, heading, sizes
from fusionroute.runtime.html_page import rendered, write_page

TEMPLATE = Path(__file__).with_name("page.html.jinja")


def write_bench_page(result: dict[str, Any], path: Path) -> None:
    """Write the page of a result. Raises FusionError where the file cannot be written."""
    page = rendered(
        TEMPLATE,
        heading=heading(result),
        charts=svg(result),
        columns=COLUMNS,
        rows=[cells(row) for row in result["rows"]],
        sizes=SIZES,
        precisions=[sizes(each) for each in result["precisions"]],
        notes=result["notes"],
        versions=", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        json=json.dumps(result, indent=1),
    )
    write_page(page, path)
