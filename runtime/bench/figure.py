"""The figures as charts, drawn by matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusionroute.runtime.errors import FusionError, UnavailableError

COLOURS = ("#3b6fb6", "#d1793b", "#4a9d6b", "#8a5fb0", "#b5485d", "#7a7a7a")
PERCENTILES = ("p50", "p95", "p99")


def library() -> Any:
    """matplotlib's class of figures. Raises UnavailableError where it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnavailableError("Charts need matplotlib: pip install 'fusionroute[bench]', or leave out --plot and --html.") from error
    return Figure


def figure(result: dict[str, Any]) -> Any:
    """Four charts: speed of every row, seconds per token, and per precision speed against quality and size."""
    drawing = library()(figsize=(11, 7.5), layout="constrained")
    speed, times, quality, size = drawing.subplots(2, 2).flat
    rows, names = result["rows"], [each["name"] for each in result["precisions"]]
    colour = dict(zip(names, COLOURS * len(names), strict=False))
    labels = [f"{row['precision']} {row['system']}" for row in rows]
    bars = speed.bar(range(len(rows)), [row["tokens_per_second"] for row in rows], color=[colour[row["precision"]] for row in rows])
    speed.bar_label(bars, fmt="%.1f")
    speed.margins(y=0.1)
    speed.set_xticks(range(len(rows)), labels, rotation=20 if len(rows) > 3 else 0, ha="right" if len(rows) > 3 else "center")
    speed.set(title="Speed", ylabel="tokens/s")
    for number, (row, label) in enumerate(zip(rows, labels, strict=True)):
        places = [place + number * 0.8 / len(rows) for place in range(len(PERCENTILES))]
        times.bar(places, [1e3 * row[name] for name in PERCENTILES], 0.8 / len(rows), label=label, color=COLOURS[number % len(COLOURS)])
    times.set_xticks([place + 0.4 - 0.4 / len(rows) for place in range(len(PERCENTILES))], PERCENTILES)
    times.set(title="Time of a token", ylabel="ms")
    times.legend(fontsize="small")
    loss = {each["name"]: 100 * (ratio - 1) for each in result["precisions"] if (ratio := (each["quality"] or {}).get("perplexity_ratio"))}
    against(quality, "Quality", "perplexity beyond torch's, %", result, colour, loss.get, "the bundle's report says nothing of quality")
    bytes_of = {each["name"]: each["bytes"] / 1e6 for each in result["precisions"] if each["bytes"]}
    against(size, "Size", "graphs and weights, or engines, MB", result, colour, bytes_of.get, "the bundle's report says nothing of sizes")
    return drawing


def against(
    axes: Any, title: str, label: str, result: dict[str, Any], colour: dict[str, str], value: Callable[[str], float | None], otherwise: str
) -> None:
    """A point per precision: its first row's speed against a value."""
    shown = False
    for name, shade in colour.items():
        row = next(row for row in result["rows"] if row["precision"] == name)
        if (x := value(name)) is not None:
            shown = True
            axes.scatter([x], [row["tokens_per_second"]], color=shade, s=60)
            axes.annotate(name, (x, row["tokens_per_second"]), xytext=(6, 6), textcoords="offset points")
    if not shown:
        axes.text(0.5, 0.5, otherwise, ha="center", va="center", transform=axes.transAxes)
    axes.margins(x=0.25)
    axes.set_ylim(0, 1.2 * max(row["tokens_per_second"] for row in result["rows"]))
    axes.set(title=f"{title} against speed", xlabel=label, ylabel="tokens/s")


def plot(result: dict[str, Any], path: Path) -> None:
    """Write the charts as a picture; the suffix of `path` decides its format.

    Raises FusionError where it cannot be written.
    """
    try:
        figure(result).savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise FusionError(f"The charts cannot be written to {path} ({error}): name a file ending in .png.") from error


def svg(result: dict[str, Any]) -> str:
    """The charts as an SVG element for a page, without namespaces, dates and links."""
    file = io.StringIO()
    figure(result).savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = file.getvalue()
    return re.sub(r' xmlns(:xlink)?="[^"]*"', "", text[text.index("<svg") :])
