"""The chart of docs/performance.md."""

from pathlib import Path
from typing import Any

from matplotlib import pyplot

from benchmarks.peers.environments import OURS

OUR_COLOUR, PEER_COLOUR = "#c2410c", "#94a3b8"


def draw(result: dict[str, Any], file: Path) -> None:
    """Speeds by precision: decoding and prefill of one model, decoding fused."""
    precisions = list(dict.fromkeys(row["precision"] for row in result["alone"]))
    panels = [("alone", "tokens_per_second", "one model: decode"), ("alone", "prefill_per_second", "one model: prefill")]
    panels += [("fused", "tokens_per_second", "fused: decode")] if result["fused"] else []
    figure, grid = pyplot.subplots(len(precisions), len(panels), figsize=(5.2 * len(panels), 2.5 * len(precisions)), squeeze=False)
    for axes_row, precision in zip(grid, precisions, strict=True):
        for axes, (part, figure_name, title) in zip(axes_row, panels, strict=True):
            rows = [row for row in result[part] if row["precision"] == precision][::-1]
            if not rows:  # not every precision is fused
                axes.set_axis_off()
                continue
            names = [" ".join(dict.fromkeys((row["runtime"], row.get("form", row.get("settings", ""))))) for row in rows]
            colours = [OUR_COLOUR if row["runtime"] == OURS else PEER_COLOUR for row in rows]
            bars = axes.barh(
                [name.removesuffix(f" {precision}").strip() for name in names], [row[figure_name] for row in rows], color=colours
            )
            axes.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
            axes.set_title(f"{title}, {precision}", fontsize=9)
            axes.tick_params(labelsize=8)
            axes.margins(x=0.15)
            axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("tokens/s", fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
