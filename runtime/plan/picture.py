"""A plan as a picture: memory stacked against the device, and the speed of each precision. Drawn by matplotlib."""

from __future__ import annotations

from pathlib import Path

from fusionroute.runtime.bench.figure import library
from fusionroute.runtime.errors import FusionError, reason
from fusionroute.runtime.plan.plan import Plan

COLOURS = {"system": "#b9bec4", "weights": "#3b6fb6", "keys and values": "#4a9d6b", "scratch": "#d1a13b"}
GOOD, EVICTING, BAD = "#2d6a3f", "#a86b12", "#b5485d"


def draw(plan: Plan, path: Path) -> None:
    """Write the picture. Raises UnavailableError without matplotlib, FusionError where the file cannot be written."""
    figure = library()(figsize=(10, 4.2), layout="constrained")
    memory, speed = figure.subplots(1, 2)
    figure.suptitle(f"{plan.request.title}\n{plan.device.title}, context {plan.request.context:,}: an estimate", fontsize=10)
    names = [choice.precision for choice in plan.choices]
    places = range(len(names))
    bottoms = [0.0] * len(names)
    parts = {
        "system": [choice.memory.reserved for choice in plan.choices],
        "weights": [choice.memory.weights for choice in plan.choices],
        "keys and values": [choice.memory.kv for choice in plan.choices],
        "scratch": [choice.memory.scratch for choice in plan.choices],
    }
    for part, sizes in parts.items():
        heights = [size / 1e9 for size in sizes]
        memory.bar(places, heights, 0.6, bottoms, color=COLOURS[part], label=part)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    memory.axhline(plan.device.memory / 1e9, color="black", linestyle="--", linewidth=1, label="memory of the device")
    memory.set_ylim(0, 1.25 * max(*bottoms, plan.device.memory / 1e9))
    memory.set_xticks(list(places), names)
    memory.set_ylabel("GB")
    memory.legend(fontsize=7, ncols=2, loc="upper right")
    for place, choice in enumerate(plan.choices):
        low, expected, high = choice.decode
        if not choice.runs:
            speed.text(place, 0, "does not fit", rotation=90, ha="center", va="bottom", color=BAD, fontsize=8)
            continue
        colour = GOOD if choice.fits else EVICTING
        speed.bar(place, expected, 0.6, color=colour, alpha=0.75)
        speed.errorbar(place, expected, [[max(expected - low, 0)], [max(high - expected, 0)]], color="black", capsize=4, linewidth=1)
        speed.annotate(f"{expected:,.3g}", (place, expected), (16, 3), textcoords="offset points", ha="center", fontsize=8)
    speed.set_xticks(list(places), names)
    speed.set_xlim(-0.6, len(names) - 0.4)
    speed.set_ylim(bottom=0)
    speed.set_ylabel("decoded tokens/s")
    speed.set_title("with the range; brown: with evicting experts", fontsize=8)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise FusionError(f"The picture cannot be written to {path} ({reason(error)}): name another place with --picture.") from error
