"""Puts the tables of the results between two marks of docs/real-system.md."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.real_system.corpus import DOMAINS, EXPERTS
from benchmarks.real_system.measure import PRECISIONS, loaded
from benchmarks.real_system.readings import Readings
from fusionroute.fr_export.evaluation.bootstrap import compare, interval
from fusionroute.fr_export.evaluation.lambdas import GRID
from fusionroute.fr_export.evaluation.outcomes import Outcomes

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
# (label, name of the system, its method)
ANSWERED = (
    ("**FusionRoute** (SFT + CDPO)", "system", "fused"),
    ("FusionRoute, SFT only", "sft", "fused"),
    ("without fusion: the routed expert alone (λ = 0)", "system", "token"),
    ("the router alone (λ = 1)", "system", "router"),
    ("direct fine-tuning, SFT + DPO", "direct", "router"),
    ("sequence level: the router's first choice", "system", "sequence-routed"),
    ("sequence level: the likeliest of all answers", "system", "sequence"),
    ("token level: Collab-style", "system", "collab"),
    ("merge: task arithmetic", "task_arithmetic", "router"),
    ("merge: average", "average", "router"),
    *((f"{name} expert", "system", f"expert:{name}") for name in EXPERTS),
    ("the base", "base", "router"),
)


def write_tables(folder: Path, page: Path) -> None:
    """Replace what stands between the marks. Raises ValueError where the page lacks them."""
    results = folder / "results"
    lam = float(json.loads((results / "lambda.json").read_text())["lam"])
    parts = [accuracy_table(results), precision_table(results, lam), reading_table(results, lam), lambda_table(results)]
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{page} lacks the marks {BEGIN} and {END}")
    page.write_text("\n\n".join([before + BEGIN, *parts, END + after]), encoding="utf-8")


def accuracy_table(results: Path) -> str:
    """Share of right answers by method, with intervals, and the paired difference from the first row."""
    rows = []
    first: list[np.ndarray] | None = None
    for label, name, method in ANSWERED:
        outcomes = loaded(results, name, "fp32").get(method)
        if outcomes is None:
            continue
        columns = correct(outcomes)
        against = "" if first is None else _difference(first, columns)
        first = first or columns
        rows.append([label, *(_percent([column]) for column in columns), _percent(columns), against])
    title = "Right answers in %, fp32, with 95 % bootstrap intervals; the last column is by how much FusionRoute is ahead, paired."
    return f"{title}\n\n{_table(['method', *DOMAINS, 'average', 'FusionRoute is ahead by'], rows)}"


def precision_table(results: Path, lam: float) -> str:
    """FusionRoute in every precision: right answers, and nats per token of the right answers."""
    rows = []
    for precision in PRECISIONS:
        outcomes = loaded(results, "system", precision).get("fused")
        if outcomes is None:
            continue
        nats = [-r.per_task(r.method(f"lambda:{lam}")[0]) for r in readings(results, "system", precision, "test").values()]
        rows.append([precision, *(_percent([column]) for column in correct(outcomes)), _percent(correct(outcomes)), _nats(nats)])
    title = "FusionRoute per precision: right answers in %, and nats per token of the right answers (mean over domains)."
    return f"{title}\n\n{_table(['precision', *DOMAINS, 'average', 'nats per token'], rows)}"


def reading_table(results: Path, lam: float) -> str:
    """Nats per token of the right answers by method, and how often the right token is the likeliest."""
    ours = f"lambda:{lam}"
    methods = [
        (f"**FusionRoute** (λ = {lam:g})", "system", ours),
        ("FusionRoute, SFT only", "sft", ours),
        ("a random expert per token", "system", f"random:{lam}"),
        ("the best expert per token (an oracle)", "system", f"oracle:{lam}"),
        ("without fusion (λ = 0)", "system", "lambda:0.0"),
        ("a random expert per token, without fusion", "system", "random:0.0"),
        ("the best expert per token, without fusion (an oracle)", "system", "oracle:0.0"),
        ("the expert of the first token for the whole answer", "system", "routed-once"),
        ("the router alone (λ = 1)", "system", "lambda:1.0"),
        *((f"{name} expert", "system", f"expert:{number}") for number, name in enumerate(EXPERTS)),
    ]
    rows = []
    for label, name, method in methods:
        own = readings(results, name, "fp32", "test")
        if own:
            nats = [-r.per_task(r.method(method)[0]) for r in own.values()]
            hits = float(np.mean([r.per_task(r.method(method)[1]).mean() for r in own.values()]))
            rows.append([label, *(_nats([column]) for column in nats), _nats(nats), f"{100 * hits:.1f}"])
    title = "Nats per token of the right answers (less is better), fp32, and in % how often the right token is the likeliest."
    return f"{title}\n\n{_table(['method', *DOMAINS, 'average', 'token right'], rows)}"


def lambda_table(results: Path) -> str:
    """Nats per token over λ, on the validation split, where λ was chosen, and on the test split."""
    rows = []
    for split in ("validation", "test"):
        own = readings(results, "system", "fp32", split)
        means = [float(np.mean([-r.per_task(r.method(f"lambda:{lam}")[0]).mean() for r in own.values()])) for lam in GRID]
        rows.append([split, *(f"{value:.3f}" for value in means)])
    return f"Nats per token over λ, mean over domains.\n\n{_table(['λ', *(f'{lam:g}' for lam in GRID)], rows)}"


def readings(results: Path, name: str, precision: str, split: str) -> dict[str, Readings]:
    """The readings of all domains; empty where one is missing."""
    files = {domain: results / f"{name}.{precision}.{split}.{domain}.readings.npz" for domain in DOMAINS}
    return {domain: Readings.load(file) for domain, file in files.items()} if all(file.exists() for file in files.values()) else {}


def correct(outcomes: Mapping[str, Outcomes]) -> list[np.ndarray]:
    """Whether each answer is right, one array [Q] per domain."""
    return [outcomes[domain].correct for domain in DOMAINS]


def _percent(columns: Sequence[np.ndarray]) -> str:
    share = interval(columns)
    return f"{100 * share.value:.1f} [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def _nats(columns: Sequence[np.ndarray]) -> str:
    mean = interval(columns)
    return f"{mean.value:.3f} [{mean.low:.3f}, {mean.high:.3f}]"


def _difference(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> str:
    by = compare(first, second)
    return f"{100 * by.difference:+.1f} [{100 * by.low:+.1f}, {100 * by.high:+.1f}]"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "|".join([" --- ", *[" --: "] * (len(heads) - 1)]) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
