"""What each step of the quantisers gains, and what bits buy: quantiser.json, a table and a picture.

python -m benchmarks.quantiser --router SYSTEM/router --expert NAME=SYSTEM/experts/NAME … --out DIR [--only int4]

Every row is one way to quantise the matrices of a system. It is exported and run like any bundle, and compared with
plain torch in fp32 on text that calibration never sees (Python's language reference). A row takes a few minutes for
four models of 135 million parameters on two cores.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx_ir as ir
import typer
from matplotlib import pyplot
from rich.console import Console
from rich.table import Table

from benchmarks.against_torch import export_uncompared, torch_references
from benchmarks.real_text import passages
from fusionroute.calibration.observe import observe
from fusionroute.calibration.serving_masks import Mask
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.commands.options import parse_experts
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.export import Request
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.graphs.decoder_blocks import matrices, reader, split
from fusionroute.fr_export.graphs.graph import Graph, users
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision import SCHEMES, int4, int8, w8a8
from fusionroute.fr_export.precision.blockwise import Format, attach, nearest, sliced, store_blocks
from fusionroute.fr_export.precision.fit_context import FitContext
from fusionroute.fr_export.precision.gptq_sequential import FittedByGptq, round_sequentially
from fusionroute.fr_export.precision.plan_w8a8 import choose
from fusionroute.fr_export.precision.rounding import measure
from fusionroute.fr_export.precision.scheme import Fitted, Scheme
from fusionroute.fr_export.precision.sensitive import sensitive
from fusionroute.fr_export.precision.smoothquant import Choose, for_blocks, for_tensors, smooth
from fusionroute.fr_export.verify.compare import compare

CONTEXT = 1024  # tokens


class Nearest:
    """Weight-only blocks, rounded to nearest."""

    def __init__(self, name: str, fmt: Format):
        self.name, self.format, self.bits = name, fmt, fmt.bits_per_weight

    def bind(self, graph: Graph, matrix: ir.Value, rows: Iterator[np.ndarray], store: Store) -> None:
        """See `scheme.Scheme`."""
        pieces = sliced(rows, int(matrix.shape[1]))
        attach(graph, matrix, store_blocks((nearest(piece, self.format) for piece in pieces), self.format, store, str(matrix.name)))


class Gptq(Nearest):
    """Weight-only blocks by GPTQ.

    Optionally after smoothing with scales that `smoothed` chooses, with another format for the embedding, or with sensitive matrices at 8 bits up to a
    budget.
    """

    def __init__(self, name: str, fmt: Format, smoothed: Choose | None = None, embedding: Format | None = None, budget: float = 0.0):
        super().__init__(name, fmt)
        self.smoothed, self.embedding, self.budget = smoothed, embedding or fmt, budget

    def fit(self, context: FitContext) -> tuple[Graph, Fitted]:
        """See `scheme.Fitting`."""
        if self.smoothed:
            graph, _ = smooth(context.graph, context.weights, context.evidence.observed, self.smoothed, context.shared.scales)
            context = replace(context, graph=graph)
        graph = context.graph
        values = graph.model.graph.initializers
        formats = {name: self.embedding if users(values[name])[1] else self.format for name in matrices(graph)}
        if self.budget:
            formats |= dict.fromkeys(sensitive(context, formats, int8.SMALL, self.budget), int8.SMALL)
        return graph, FittedByGptq(self, round_sequentially(context, formats))


class StaticW8A8(Nearest):
    """W8A8, optionally without SmoothQuant (`smoothed`) or calibrated on all tokens, not the served ones (`routed`)."""

    def __init__(self, name: str, smoothed: bool = True, routed: bool = True):
        super().__init__(name, int8.FORMAT)
        self.smoothed, self.routed = smoothed, routed

    def fit(self, context: FitContext) -> tuple[Graph, Fitted]:
        """See `scheme.Fitting`."""
        graph, weights, evidence = context.graph, context.weights, context.evidence
        if not self.routed:
            masks = [Mask(len(text.ids), np.arange(len(text.ids))) for text in evidence.recorded]
            unrouted = observe(split(graph), evidence.recorded, masks, *reader(graph, weights))
            context = replace(context, evidence=replace(evidence, masks=masks, observed=unrouted))
        if self.smoothed:
            return w8a8.StaticW8A8().fit(context)
        formats = {matrix: w8a8.by_row(channels) for matrix, channels in matrices(graph).items()}
        observed = context.evidence.observed
        plan = choose(graph, weights, observed, measure(context, observed))
        return graph, w8a8.PlannedW8A8(plan, round_sequentially(context, formats))


def symmetric(rows: np.ndarray, importance: np.ndarray | None = None) -> tuple[np.ndarray, None]:
    """4 bits around the fixed zero point 8."""
    return (np.abs(rows).max(-1) / np.float32(7.5)).astype(np.float16), None


def unclipped(rows: np.ndarray, importance: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """4 bits with a zero point, over the full range of a block."""
    low, high = np.minimum(rows.min(-1), 0), np.maximum(rows.max(-1), 0)
    scale = ((high - low) / np.float32(15)).astype(np.float16)
    step = scale.astype(np.float32)
    zero = np.clip(np.rint(-low * np.divide(1, step, out=np.zeros_like(step), where=step > 0)), 0, 15)
    return scale, zero.astype(np.uint8)


def four_bits(block: int, grid: Any = int4.grid, zeros: bool = True) -> Format:
    """A 4-bit format with fp16 scales."""
    return Format(4, block, np.dtype(np.float16), zeros, grid)


STEPS: tuple[Scheme, ...] = (
    Nearest("int4 nearest, symmetric, 64", four_bits(64, symmetric, zeros=False)),
    Nearest("int4 nearest, zero points, 32", four_bits(32, unclipped)),
    Nearest("int4 nearest, clipped ranges, 32", four_bits(32)),
    Gptq("int4 GPTQ, 128", four_bits(128)),
    Gptq("int4 GPTQ, 64", four_bits(64)),
    Gptq("int4 GPTQ, 64, embedding 32", four_bits(64), embedding=four_bits(32)),
    Gptq("int4 GPTQ, 64, embedding 32, sensitive at 8 bits", four_bits(64), embedding=four_bits(32), budget=int4.BUDGET),
    Gptq("int4 GPTQ, 32", four_bits(32)),
    Gptq("int4 GPTQ, 32, sensitive at 8 bits", four_bits(32), budget=int4.BUDGET),
    Gptq("int4 GPTQ, 16", four_bits(16)),
    Nearest("int8 nearest, 64", int8.FORMAT),
    Gptq("int8 GPTQ, 64", int8.FORMAT),
    Gptq("int8 GPTQ, 64, smoothed for tensors", int8.FORMAT, smoothed=for_tensors),
    Gptq("int8 GPTQ, 64, smoothed for blocks", int8.FORMAT, smoothed=for_blocks),
    int8.Int8(),
    StaticW8A8("w8a8 without SmoothQuant", smoothed=False),
    StaticW8A8("w8a8 calibrated on all tokens", routed=False),
    StaticW8A8("w8a8 as it is"),
)


def main(
    router: Annotated[str, typer.Option(help="Router checkpoint.")],
    expert: Annotated[list[str], typer.Option(help="NAME=SRC; repeat per expert.")],
    out: Annotated[Path, typer.Option(help="Folder of the bundles, quantiser.json and quantiser.png.")],
    family: Annotated[str, typer.Option(help="Model family.")] = "llama3",
    only: Annotated[str, typer.Option(help="Rows whose name holds this.")] = "",
    text: Annotated[Path | None, typer.Option(help="UTF-8 text; default: Python's language reference.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens read in chunks.")] = 4096,
) -> None:
    """Export a system in many ways and measure each; rows already in quantiser.json are skipped."""
    experts, file = dict(parse_experts(expert)), out / "quantiser.json"
    out.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    stages = Stages(Console(stderr=True))
    system = System.open(FAMILIES[family], router, experts, max_seq_len=CONTEXT)
    texts = passages(system, text, tokens)
    with stages.progress:
        references = None
        for step in STEPS:
            if step.name in rows or only not in step.name:
                continue
            SCHEMES["ort:cpu"][step.name] = step
            bundle = out / "bundle"
            request = Request(FAMILIES[family], router, experts, (step.name,), ("ort:cpu",), bundle, max_seq_len=CONTEXT, force=True)
            variant = export_uncompared(request, stages)["variants"][0]
            if references is None:
                references = torch_references(system, bundle, texts, stages)
            with stages.stage(f"measuring {step.name}", sum(map(len, texts))) as advance:
                compared = compare(str(bundle), step.name, texts, references, advance, 1)
            rows[step.name] = {"bits": variant["bits_per_weight"], "fitted": variant["fitted"]} | compared["chunks"]
            file.write_text(json.dumps(rows, indent=1))
    table = Table("quantised as", "bits", "perplexity", "KL", "top-1", "routing")
    for name, row in rows.items():
        shares = (f"{row[key]:.1%}" for key in ("greedy_agreement", "routing_agreement"))
        table.add_row(name, f"{row['bits']:.2f}", f"{row['perplexity_ratio'] - 1:+.1%}", f"{row['kl_mean']:.3g}", *shares)
    Console(width=110).print(table)
    if any("nearest" in name or "GPTQ" in name for name in rows):
        draw(rows, out / "quantiser.png")


def draw(rows: dict[str, Any], path: Path) -> None:
    """Bits against loss, for weight-only rows."""
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for kind, marker, below in (("nearest", "o", False), ("GPTQ", "s", True)):
        own = {name: row for name, row in rows.items() if kind in name}
        axes.scatter([row["bits"] for row in own.values()], [row["kl_mean"] for row in own.values()], marker=marker, label=kind)
        for name, row in own.items():
            axes.annotate(
                name.partition(" ")[2].partition(", ")[2],
                (row["bits"], row["kl_mean"]),
                xytext=(2, -5) if below else (5, 5),
                rotation=-40 if below else 0,
                rotation_mode="anchor",
                va="top" if below else "baseline",
                textcoords="offset points",
                fontsize=8,
            )
    axes.margins(x=0.2, y=0.25)
    axes.set(xlabel="bits per weight, all matrices", ylabel="mean KL from fp32 (nats)", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    typer.run(main)
