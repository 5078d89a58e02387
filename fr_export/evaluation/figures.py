"""Pictures of an evaluation, as PNG bytes. matplotlib is imported when the first one is drawn."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fusionroute.fr_export.evaluation import routing
from fusionroute.fr_export.evaluation.lambdas import Curve, best
from fusionroute.fr_export.evaluation.report import Row
from fusionroute.fr_export.evaluation.token_classes import CLASSES


def accuracy(entries: Sequence[dict[str, Any]]) -> bytes:
    """Bars of exact match with 95 % intervals.

    There is a panel per bundle and precision, in it a group per domain and one for the average, and a bar per method.
    `entries` are those of `report.summary`.
    """
    methods = list(dict.fromkeys(entry["method"] for entry in entries))
    panels = list(dict.fromkeys((entry["bundle"], entry["precision"]) for entry in entries))
    groups = [*entries[0]["domains"], "average"]
    width = 0.84 / len(methods)
    figure = _figure(max(6.4, 0.15 * len(groups) * len(methods) + 2), 2.6 * len(panels) + 0.6)
    for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        for entry in entries:
            if (entry["bundle"], entry["precision"]) == panel:
                number = methods.index(entry["method"])
                accuracies = [*(scores["accuracy"] for scores in entry["domains"].values()), entry["average"]["accuracy"]]
                values, low, high = (100 * np.array([interval[key] for interval in accuracies]) for key in ("value", "low", "high"))
                axes.bar(
                    np.arange(len(groups)) + (number - (len(methods) - 1) / 2) * width, values, width * 0.92,
                    yerr=np.maximum([values - low, high - values], 0), error_kw={"elinewidth": 0.8, "ecolor": "0.25"},
                    color=_colour(number, len(methods)), label=entry["method"],
                )  # fmt: skip
        axes.set_title(" ".join(panel), fontsize=9)
        axes.set_xticks(range(len(groups)), groups)
        axes.set_ylim(0, 105)
        axes.set_ylabel("exact match (%)")
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = int(figure.get_figwidth() / (0.5 + 0.065 * max(map(len, labels))))  # by the inches of the longest label
    figure.legend(handles, labels, loc="outside upper center", ncols=max(1, min(5, columns)), fontsize=8, frameon=False)
    return _png(figure)


def lambda_curves(curves: Mapping[str, Curve]) -> bytes:
    """Average exact match over λ, a line per labelled curve, its best λ marked."""
    figure = _figure(5.2, 3.4)
    axes = figure.subplots()
    for number, (label, points) in enumerate(curves.items()):
        lams, values = np.array(points).T
        (line,) = axes.plot(lams, 100 * values, marker="o", markersize=3, linewidth=1.2, color=_colour(number, len(curves)), label=label)
        top = best(points)
        axes.plot(top, 100 * dict(points)[top], marker="o", markersize=9, fillstyle="none", color=line.get_color())
    axes.set_xlabel("λ: the router's share of the fused logits")
    axes.set_ylabel("average exact match (%)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    return _png(figure)


def routing_maps(rows: Sequence[Row]) -> bytes:
    """Per row two maps, by domain and by token class: the share of the tokens that came from each expert.

    Colours change at chance level, 1/n for n experts.
    """
    from matplotlib.colors import Normalize, TwoSlopeNorm

    tallest = max(max(len(row.outcomes), len(CLASSES)) for row in rows)
    figure = _figure(9.0, (0.8 + 0.32 * tallest) * len(rows) + 0.3)
    for axes, row in zip(figure.subplots(len(rows), 2, squeeze=False), rows, strict=True):
        chance = 1 / len(row.experts)
        norm = TwoSlopeNorm(chance, 0, 1) if chance < 1 else Normalize(0, 1)
        maps = {
            "domain": (list(row.outcomes), routing.by_domain(row.outcomes)),
            "token class": (list(CLASSES), routing.by_class(row.outcomes)),
        }
        for panel, (kind, (names, shares)) in zip(axes, maps.items(), strict=True):
            image = panel.imshow(shares, cmap="RdBu_r", norm=norm, aspect="auto")
            panel.set_xticks(range(len(row.experts)), row.experts, fontsize=8)
            panel.set_yticks(range(len(names)), names, fontsize=8)
            panel.tick_params(length=0)
            panel.set_title(f"{row.bundle} {row.precision} {row.method}: tokens by {kind}", fontsize=9)
            for (y, x), share in np.ndenumerate(shares):
                text = "–" if np.isnan(share) else f"{share:.0%}"
                panel.text(x, y, text, ha="center", va="center", fontsize=8, color="black" if abs(norm(share) - 0.5) < 0.35 else "white")
        bar = figure.colorbar(image, ax=axes[1], ticks=[0, chance, 1])
        bar.ax.set_yticklabels(["0 %", f"chance {chance:.0%}", "100 %"], fontsize=8)
    return _png(figure)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _colour(number: int, count: int) -> Any:
    from matplotlib import colormaps

    return colormaps["tab10" if count <= 10 else "tab20"](number % 20)


def _png(figure: Any) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=140)
    return content.getvalue()
