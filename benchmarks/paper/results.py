"""Writes docs/results.md: the prose is in results.template.md, tables and pictures come from the measured results."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.paper.routing_choices import Choices
from fusionroute.fr_export.checkpoints.fusion_settings import FusionSettings
from fusionroute.fr_export.evaluation import figures, lambdas, routing
from fusionroute.fr_export.evaluation.bootstrap import compare, interval
from fusionroute.fr_export.evaluation.outcomes import Results, load_results
from fusionroute.fr_export.evaluation.report import Row
from fusionroute.fr_export.evaluation.scoring import bleu
from fusionroute.fr_export.evaluation.token_classes import CLASSES
from fusionroute.fr_export.tasks.domains import ALL_DOMAINS, DOMAINS, draw_many

FULL, HALF = 128, 64
TEST_DRAW = 1  # which draw of test prompts: draw 0 was seen before the last change of the training budget
Cells = dict[str, list[np.ndarray]]
"""domain → correct [N] of each seed (one where the method has no router)."""


@dataclass(frozen=True)
class Method:
    """One row: the file of its results ({} is the seed) and the method's name there."""

    label: str
    file: str
    method: str

    def cells(self, folder: Path) -> Cells:
        """Results per domain and seed; empty if there is no file."""
        names = [self.file.format(seed) for seed in range(3)] if "{}" in self.file else [self.file]
        seeds: list[Results] = [load_results(folder / f"{name}.npz") for name in names if (folder / f"{name}.npz").exists()]
        return {domain: [results[self.method][domain].correct for results in seeds] for domain in ALL_DOMAINS} if seeds else {}


OURS = Method("**FusionRoute** (SFT + CDPO)", "system-{}", "fused")
TOKEN = Method("without complementary logits (λ = 0)", "system-{}", "token")
DIRECT = Method("direct fine-tuning, SFT + DPO", "direct-{}", "router")
SEQUENCE = Method("sequence level: the router's first choice", "system-{}", "sequence-routed")
COLLAB = Method("token level: Collab-style", "system-0", "collab")
TASK_ARITHMETIC = Method("merge: task arithmetic", "task_arithmetic", "router")
METHODS = (
    OURS,
    Method("FusionRoute, SFT only", "sft-{}", "fused"),
    Method("FusionRoute at λ = 0.5 (greedily the same as additive)", "system-{}", "lambda:0.5"),
    TOKEN,
    Method("the router alone (λ = 1)", "system-{}", "router"),
    DIRECT,
    Method("direct fine-tuning, SFT only", "direct-sft-{}", "router"),
    SEQUENCE,
    Method("sequence level: the likeliest of all answers", "system-0", "sequence"),
    COLLAB,
    TASK_ARITHMETIC,
    Method("merge: DARE", "dare", "router"),
    Method("merge: average", "average", "router"),
    *(Method(f"{name} expert", "system-0", f"expert:{name}") for name in DOMAINS),
    Method("common base", "base", "router"),
)
CHARTED = (OURS, TOKEN, DIRECT, SEQUENCE, COLLAB, TASK_ARITHMETIC)  # the bars of the chart


def write_results(work: Path, docs: Path) -> None:
    """Fill the {places} of the template for every family; pictures go into docs/results/."""
    pictures = docs / "results"
    pictures.mkdir(exist_ok=True)
    places: dict[str, str] = {}
    curves: dict[str, lambdas.Curve] = {}
    for family in ("gemma2", "llama3"):
        folder = work / f"{family}-{FULL}"
        places |= {f"{family}_accuracy": accuracy_table(folder), f"{family}_difference": difference_table(folder)}
        places |= {f"{family}_precision": precision_table(folder), f"{family}_lambda": lambda_line(folder)}
        places |= {f"{family}_classes": class_table(folder), f"{family}_informative": informative_table(folder)}
        places[f"{family}_texts"] = text_table(folder)
        for seed in range(3):
            curves[f"{family}, seed {seed}"] = FusionSettings.read(folder / f"system-{seed}.fusion").lam_curve or []
        rows = [Row(family, "fp32", "fused", load_results(folder / "system-0.npz")["fused"])]
        (pictures / f"routing-{family}.png").write_bytes(figures.routing_maps(rows))
        bars = [entry(family, method, method.cells(folder)) for method in CHARTED]
        (pictures / f"accuracy-{family}.png").write_bytes(figures.accuracy(bars))
        (pictures / f"loss-{family}.png").write_bytes((folder / "routers" / "0" / "loss.png").read_bytes())
    (pictures / "lambda.png").write_bytes(figures.lambda_curves(curves))
    places["sizes"] = size_table(work)
    template = (Path(__file__).parent / "results.template.md").read_text(encoding="utf-8")
    for name, text in places.items():
        template = template.replace("{" + name + "}", text)
    (docs / "results.md").write_text(template, encoding="utf-8")


def pooled(cells: Cells, domains: Sequence[str] = ALL_DOMAINS) -> list[np.ndarray]:
    """The share of seeds that answered each prompt right, one array [N] per domain."""
    return [np.mean(cells[domain], axis=0) for domain in domains]


def average(cells: Cells, seed: int, domains: Sequence[str] = ALL_DOMAINS) -> float:
    """Accuracy of one seed, averaged over domains."""
    return float(np.mean([cells[domain][seed].mean() for domain in domains]))


def entry(family: str, method: Method, cells: Cells) -> dict[str, Any]:
    """One bar of `figures.accuracy`."""
    named = {"bundle": family, "precision": "fp32", "method": method.label.replace("*", "")}
    domains = {domain: {"accuracy": interval(pooled(cells, [domain]))._asdict()} for domain in ALL_DOMAINS}
    return named | {"domains": domains, "average": {"accuracy": interval(pooled(cells))._asdict()}}


def accuracy_table(folder: Path) -> str:
    """Exact match of all methods in %: mean over seeds, and the average of each seed."""
    lines = [row("method", *ALL_DOMAINS, "average of five", "of the first three", "each seed"), row("---", *["--:"] * 8)]
    for method in METHODS:
        if cells := method.cells(folder):
            five = interval(pooled(cells))
            seeds = " · ".join(f"{100 * average(cells, seed):.1f}" for seed in range(len(cells["math"])))
            single = [f"{100 * interval(pooled(cells, [domain])).value:.1f}" for domain in ALL_DOMAINS]
            spread = f"{100 * five.value:.1f} ±{50 * (five.high - five.low):.1f}"
            lines.append(row(method.label, *single, spread, f"{100 * interval(pooled(cells, DOMAINS)).value:.1f}", seeds))
    return "\n".join(lines)


def difference_table(folder: Path) -> str:
    """FusionRoute minus every other method: paired bootstrap over prompts, seeds averaged."""
    ours = OURS.cells(folder)
    lines = [row("FusionRoute less …", "average of five", "p", "of the first three", "p"), row("---", *["--:"] * 4)]
    for method in METHODS[1:]:
        if cells := method.cells(folder):
            shown = []
            for domains in (ALL_DOMAINS, DOMAINS):
                gap = compare(pooled(ours, domains), pooled(cells, domains))
                shown += [f"{100 * gap.difference:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]", f"{gap.p:.3f}"]
            lines.append(row(method.label, *shown))
    return "\n".join(lines)


def text_table(folder: Path) -> str:
    """How close wrong answers come: word F1 averaged over domains, and BLEU of the instruction answers, seed 0."""
    references = [sample.answer for sample in draw_many("instruction", "test", len(OURS.cells(folder)["instruction"][0]), TEST_DRAW)]
    lines = [row("method", "F1, average of five", "BLEU, instruction"), row("---", "--:", "--:")]
    for method in METHODS:
        file = folder / f"{method.file.format(0)}.npz"
        if file.exists():
            own = load_results(file)[method.method]
            overlap = np.mean([one.f1.mean() for one in own.values()])
            lines.append(row(method.label, f"{100 * overlap:.1f}", f"{bleu(own['instruction'].answers, references):.1f}"))
    return "\n".join(lines)


def precision_table(folder: Path) -> str:
    """The shipped system in every precision, against fp32 on the same prompts."""
    base = Method("", "shipped.fp32", "fused").cells(folder)
    lines = [row("precision", *ALL_DOMAINS, "average of five", "less fp32"), row("---", *["--:"] * 7)]
    for precision, file in (("fp32", "shipped.fp32"), ("fp16", "shipped.fp16"), ("int8", "shipped.int8")):
        if cells := Method("", file, "fused").cells(folder):
            gap = compare(pooled(cells), pooled(base))
            single = [f"{100 * average(cells, 0, [domain]):.2f}" for domain in ALL_DOMAINS]
            less = "" if precision == "fp32" else f"{100 * gap.difference:+.2f} [{100 * gap.low:+.2f}, {100 * gap.high:+.2f}]"
            lines.append(row(precision, *single, f"{100 * average(cells, 0):.2f}", less))
    return "\n".join(lines)


def lambda_line(folder: Path) -> str:
    """The λ that every seed's validation split chose."""
    chosen = [FusionSettings.read(folder / f"system-{seed}.fusion").lam for seed in range(3)]
    scales = {name: json.loads((folder / f"{name}.scale.json").read_text())["scale"] for name in ("task_arithmetic", "dare")}
    return (
        f"λ = {', '.join(map(str, chosen))} (seeds 0, 1, 2); scale {scales['task_arithmetic']} of task arithmetic, {scales['dare']} of DARE"
    )


def class_table(folder: Path) -> str:
    """Share of each expert per token class over all domains, seed 0; chance is a third."""
    outcomes = load_results(folder / "system-0.npz")["fused"]
    shares = routing.by_class(outcomes)
    lines = [row("token class", *DOMAINS), row("---", *["--:"] * 3)]
    lines += [row(name, *(f"{share:.0%}" for share in own)) for name, own in zip(CLASSES, shares, strict=True) if not np.isnan(own).any()]
    return "\n".join(lines)


def informative_table(folder: Path) -> str:
    """Share of each expert where experts differ, and how often the routed one is right; seeds averaged."""
    seeds = [Choices.load(folder / f"system-{seed}.choices.npz").table(DOMAINS) for seed in range(3)]
    lines = [row("token class", "tokens", *DOMAINS, "routed expert right", "a random one"), row("---", *["--:"] * 6)]
    for same in zip(*seeds, strict=True):
        shares = np.mean([line[2] for line in same], axis=0)
        hit, chance = (np.mean([line[place] for line in same]) for place in (3, 4))
        lines.append(row(same[0][0], f"{same[0][1]:,}", *(f"{share:.0%}" for share in shares), f"{hit:.0%}", f"{chance:.0%}"))
    return "\n".join(lines)


def size_table(work: Path) -> str:
    """The gain of fusion at two sizes."""
    against: Mapping[str, Method] = {method.label: method for method in (TOKEN, DIRECT, SEQUENCE)}
    lines = [
        row("family", "hidden size", "FusionRoute", *(f"less {label}" for label in against)),
        row("---", *["--:"] * (2 + len(against))),
    ]
    for family in ("gemma2", "llama3"):
        for width in (HALF, FULL):
            folder = work / f"{family}-{width}"
            if ours := OURS.cells(folder):
                gaps = [compare(pooled(ours), pooled(method.cells(folder))) for method in against.values()]
                shown = [f"{100 * gap.difference:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]" for gap in gaps]
                lines.append(row(family, str(width), f"{100 * interval(pooled(ours)).value:.1f}", *shown))
    return "\n".join(lines)


def row(*cells: str) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(cells)} |"
