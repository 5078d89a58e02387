"""The command of this folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib import pyplot
from rich.console import Console
from rich.table import Table

from benchmarks.delta_bits.laboratory import CONTEXT, Laboratory
from benchmarks.delta_bits.rows import rows
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.commands.options import parse_experts
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.families import FAMILIES

BITS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
TICKS = (6, 10, 15, 20, 30, 40, 60)  # of the picture, in bits


def main(
    out: Annotated[Path, typer.Option(help="Folder of the results.")],
    family: Annotated[str | None, typer.Option(help="The embedded system of a family.")] = None,
    router: Annotated[str | None, typer.Option(help="Router checkpoint.")] = None,
    expert: Annotated[list[str] | None, typer.Option(help="NAME=SRC; repeat per expert.")] = None,
    bits: Annotated[str, typer.Option(help="Budgets of the factors, bits per weight of the base.")] = ",".join(map(str, BITS)),
    tokens: Annotated[int, typer.Option(help="Of the text.")] = 2048,
    questions: Annotated[int, typer.Option(help="Of each task of the embedded systems; 0: accuracy is not measured.")] = 100,
) -> None:
    """Measure every row; those already in delta_bits.json are skipped."""
    out.mkdir(parents=True, exist_ok=True)
    preset = FAMILIES[family].preset("tiny") if family else None
    source = router or (preset.router if preset else None)
    experts = dict(parse_experts(expert or [])) or dict(preset.experts if preset else {})
    assert source, "name a --family or a --router"
    file = out / "delta_bits.json"
    results: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    stages = Stages(Console(stderr=True))
    with stages.progress:
        laboratory = Laboratory(System.open(None, source, experts, max_seq_len=CONTEXT), out, tokens, stages)
        if questions and "unrounded" not in results:
            results["unrounded"] = {"line": "unrounded"} | laboratory.measured("unrounded", {}, questions)
        for row in rows(laboratory, [float(each) for each in bits.split(",")]):
            label = f"{row.line}: {row.name}"
            results[label] = (results.get(label) or laboratory.measured(label, row.matrices, questions)) | row.figures
            file.write_text(json.dumps(results, indent=1))
    table = Table("row", "bits", "error", "KL", "perplexity", "routing", "accuracy")
    for label, measured in results.items():
        accuracy, error = f"{measured['accuracy']:.1%}" if "accuracy" in measured else "–", measured.get("error")
        numbers = f"{measured['kl_mean']:.2e}", f"{measured['perplexity_ratio'] - 1:+.1%}", f"{measured['routing_agreement']:.1%}"
        table.add_row(label, f"{measured.get('bits', 0):.1f}", "–" if error is None else f"{error:.2g}", *numbers, accuracy)
    Console(width=120).print(table)
    draw(results, out / "delta_bits.png")


def draw(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Bits of the whole system against loss, and against accuracy where it was measured."""
    measured = "unrounded" in results
    figure, axes = pyplot.subplots(1, 1 + measured, figsize=(6.5 * (1 + measured), 5), layout="constrained", squeeze=False)
    lines = dict.fromkeys(row["line"] for row in results.values() if "bits" in row)
    for place, key in enumerate(("kl_mean", "accuracy")[: 1 + measured]):
        for line in lines:
            own = sorted((row["bits"], row[key]) for row in results.values() if row["line"] == line)
            style = {"linestyle": "--" if "plain" in line else "-", "color": "C0" if line.startswith("int8") else "C1"}
            marker = "s" if "everything" in line else "^" if "blocks" in line else "o" if "weighted" in line else "."
            axes[0, place].plot(*zip(*own, strict=True), marker=marker, label=line, **style)
        axes[0, place].grid(alpha=0.3, which="both")
        axes[0, place].set(xlabel="bits of router and experts, per weight of one model", xscale="log")
        axes[0, place].set_xticks(TICKS, map(str, TICKS))
        axes[0, place].set_xticks([], minor=True)
    axes[0, 0].set(ylabel="mean KL from fp32 (nats)", yscale="log")
    axes[0, 0].legend(fontsize=8)
    if measured:
        axes[0, 1].axhline(results["unrounded"]["accuracy"], color="grey", linewidth=1)
        axes[0, 1].set(ylabel="exact match, mean over tasks")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    typer.run(main)
