"""Draws the loss curves."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_TITLES = {
    "lm_loss": "LM loss (nats per token)",
    "routing_loss": "routing loss (nats per informative token)",
    "dpo_loss": "DPO loss (nats per pair)",
    "reward_accuracy": "reward accuracy",
    "reward_margin": "reward margin",
}


def draw(stages: Sequence[dict[str, Any]], file: Path) -> None:
    """One panel per quantity, one line per stage, over the optimizer steps of all stages.

    A stage is {"name": str, "points": [{"step": int, quantity: float, …}, …]}.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    quantities = [name for name in _TITLES if any(name in point for stage in stages for point in stage["points"])]
    figure = Figure(figsize=(3.4 * len(quantities), 2.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(quantities), squeeze=False)[0]
    for panel, name in zip(panels, quantities, strict=True):
        earlier_steps = 0
        for stage in stages:
            points = [(earlier_steps + point["step"], point[name]) for point in stage["points"] if name in point]
            if points:
                panel.plot(*zip(*points, strict=True), linewidth=1.2, marker="." if len(points) < 3 else "", label=stage["name"])
            earlier_steps += stage["points"][-1]["step"] if stage["points"] else 0
        panel.set_title(_TITLES[name], fontsize=9)
        panel.set_xlabel("step", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    if len(stages) > 1:
        panels[0].legend(fontsize=8, frameon=False)
    figure.savefig(file, dpi=110)
