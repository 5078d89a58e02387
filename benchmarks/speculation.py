"""What speculation gains on real texts: speed with and without drafts, acceptance, and the worst case.

python -m benchmarks.speculation BUNDLE [BUNDLE …] --out FILE.json [--precision int8] [--each 12]

Texts: the built-in prompts (greedy, and sampled at temperature 0.7), prompts that ask for a copy of their own input,
and the built-in prompts with drafts that are all wrong: the router's logits, which then have no weight in the fusion,
and the looked-up drafts are shifted by one token. Every text is generated without drafts, with drafts, and by the first
expert alone, in turns; the first text of each kind warms up. Ratios are of times summed over all texts, since a single
short text says little. "modelled" is the time that the cost model of docs/speculation.md predicts for plain decoding,
from passes timed after every round, divided by the time measured; both take the fastest round.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.router_outputs import router_outputs
from fusionroute.calibration.prompts import BUILTIN
from fusionroute.runtime import FusionRuntime, limits
from fusionroute.runtime.backend import Output
from fusionroute.runtime.speculation import costs
from fusionroute.runtime.speculation.lookup import Lookup

CODE = '''def total(prices, tax):
    """Sum of the prices with tax."""
    result = 0.0
    for price in prices:
        result += price * (1 + tax)
    return round(result, 2)


def average(prices):
    """Mean of the prices, or 0 where there are none."""
    if not prices:
        return 0.0
    return sum(prices) / len(prices)
'''
QUOTE = (
    "The harbour was quiet that morning. Two boats had left before dawn, and the third lay at the pier with its engine open. "
    "Nobody spoke of the storm. The old man mended his net and counted the gulls, as he did every day, and his daughter counted the hours."
)
REPEATING = (
    f"Here is a Python file:\n\n```python\n{CODE}```\n\nHere is the same file once more:\n\n```python\n",
    f"File a.py:\n{CODE}\nFile b.py, in which `average` is called `mean`:\ndef total(prices, tax):\n",
    f'Text: "{QUOTE}"\n\nThe text again, word for word: "The harbour was',
    f"Original:\n{QUOTE}\n\nCopy:\n{QUOTE[:30]}",
    "apples, pears, plums, cherries, grapes, lemons, oranges\n" * 4 + "apples, pears,",
    '{"name": "Ada", "born": 1815, "field": "mathematics"}\n{"name": "Alan", "born": 1912, "field": "computing"}\n' * 2 + '{"name": "Ada",',
)


def main(
    bundles: Annotated[list[Path], typer.Argument(help="Bundles to measure.")],
    out: Annotated[Path, typer.Option(help="JSON file with all figures.")],
    precision: Annotated[str, typer.Option(help="Precision to load.")] = "int8",
    each: Annotated[int, typer.Option(help="Built-in prompts, evenly chosen.")] = 12,
    rounds: Annotated[int, typer.Option(help="Rounds that count.")] = 2,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each text.")] = 64,
    only: Annotated[str, typer.Option(help="Kinds of texts whose names hold this.")] = "",
) -> None:
    """Measure and print a table."""
    prompts = [BUILTIN[index] for index in np.linspace(0, len(BUILTIN) - 1, each).astype(int)]
    figures: dict[str, Any] = {}
    with Progress(console=Console(stderr=True)) as progress:
        for bundle in bundles:
            figures[bundle.name] = measure(bundle, precision, prompts, rounds, tokens, only, progress)
            out.write_text(json.dumps(figures, indent=1) + "\n")
    table = Table(
        "bundle",
        "texts",
        "plain tok/s",
        "modelled",
        "drafts tok/s",
        "×",
        "slowest ×",
        "× alone",
        "accepted",
        "drafted",
        "switches",
        "parted",
    )
    for name, kinds in figures.items():
        for kind, row in kinds.items():
            table.add_row(
                name,
                kind,
                f"{row['plain']:.1f}",
                f"{row['modelled']:.2f}",
                f"{row['drafts']:.1f}",
                f"{row['ratio']:.2f}",
                f"{row['slowest']:.2f}",
                f"{row['alone']:.2f}",
                f"{row['acceptance']:.0%}",
                str(row["drafted"]),
                f"{row['switches']:.0%}",
                f"{row['parted']}/{row['texts']}",
            )
    Console(width=140).print(table)


def measure(bundle: Path, precision: str, prompts: list[str], rounds: int, tokens: int, only: str, progress: Progress) -> dict[str, Any]:
    """All kinds of texts on one bundle."""
    options: dict[str, Any] = {"precision": precision, "device": "cpu", "prefix_cache": 0}
    kinds: dict[str, tuple[Sequence[str], dict[str, Any], bool]] = {
        "built-in, greedy": (prompts, {}, False),
        "built-in, sampled": (prompts, {"temperature": 0.7, "seed": 1}, False),
        "repeating, greedy": (REPEATING, {}, False),
        "all drafts wrong": (prompts, {"lam": 0.0}, True),
    }
    rows = {}
    with FusionRuntime.load(bundle, **options) as plain, FusionRuntime.load(bundle, speculation="auto", **options) as drafting:
        for kind, (texts, sampling, wrong) in kinds.items():
            if only not in kind:
                continue
            task = progress.add_task(f"{bundle.name}: {kind}", total=len(texts) * rounds)
            ways = {"plain": (plain, None), "drafts": (drafting, None), "alone": (plain, plain.expert_names[0])}
            for rt, expert in ways.values():
                generate(rt, texts[0], tokens, sampling, wrong, expert)
            times: dict[str, list[list[float]]] = {way: [] for way in ways}
            runs, measured_costs = {}, []
            for _ in range(rounds):
                for seconds in times.values():
                    seconds.append([])
                for number, text in enumerate(texts):
                    for way, (rt, expert) in ways.items():
                        per_token, runs[number, way] = generate(rt, text, tokens, sampling, wrong, expert)
                        times[way][-1].append(per_token)
                    progress.advance(task)
                measured_costs.append(costs.measure(plain.bundle, plain.backend))  # the machine's speed changes
            rows[kind] = summary(runs, times, len(texts))
            modelled = sum(model(fastest(measured_costs), runs[number, "plain"], plain.expert_names) for number in range(len(texts)))
            rows[kind]["modelled"] = modelled / float(np.min(times["plain"], axis=0).sum())
            progress.remove_task(task)
    return rows


def generate(
    rt: FusionRuntime, text: str, count: int, sampling: dict[str, Any], wrong: bool, expert: str | None
) -> tuple[float, dict[str, Any]]:
    """Generate one text, past its end, by `expert` alone if there is one.

    Returns seconds per token after the first, and what came out.
    """
    options = {name: value for name, value in sampling.items() if name != "lam"}
    with wrong_drafts(rt) if wrong and expert is None else nullcontext():
        session = rt.session(expert=expert, lam=sampling.get("lam") if expert is None else 0.0)
        session.append(rt.encode(text)[: rt.max_seq_len - count - 8])
        tokens = session.steps(1, **options)
        start = time.perf_counter()
        while len(tokens) < count:
            tokens += session.steps(count - len(tokens), **options)
        seconds = time.perf_counter() - start
    return seconds / (count - 1), {
        "prompt": len(session) - count,
        "ids": [token.id for token in tokens],
        "experts": [token.expert for token in tokens],
        "drafted": session.drafted,
        "accepted": session.accepted,
    }


def fastest(measured: list[costs.Costs]) -> costs.Costs:
    """The minimum of each figure."""
    models = zip(*((round_costs.router, *round_costs.experts) for round_costs in measured), strict=True)
    router, *experts = (costs.passes(np.min(passes, axis=0)) for passes in models)
    return costs.Costs(router, tuple(experts), min(round_costs.fusion for round_costs in measured))


def model(cost: costs.Costs, run: dict[str, Any], names: list[str]) -> float:
    """Seconds per token of one text, as the cost model of plain decoding predicts.

    For each token the router reads one token, and the expert all that it has missed.
    """
    read = dict.fromkeys(names, 0)
    total = 0.0
    for number, name in enumerate(run["experts"]):
        length = run["prompt"] + number
        missed, read[name] = length - read[name], length
        if number:  # the first token is not timed
            router = costs.seconds_by_tokens(cost.router, length)
            expert = costs.seconds_by_tokens(cost.experts[names.index(name)], length)
            largest = limits.MAX_ROUND_TOKENS
            beyond = max(missed - largest, 0) * (expert[largest] - expert[largest // 2]) / (largest // 2)
            total += router[1] + expert[min(missed, largest)] + beyond + cost.fusion
    return total / (len(run["experts"]) - 1)


@contextmanager
def wrong_drafts(rt: FusionRuntime) -> Iterator[None]:
    """Shift the router's logits and the looked-up drafts by one token, so that no draft is what the expert says."""
    propose = Lookup.propose

    def shifted_logits(output: Output) -> Output:
        return output._replace(logits=np.roll(output.logits, 1, axis=-1))

    def shifted_drafts(lookup: Lookup, tokens: Sequence[int], most: int) -> list[int]:
        return [(token + 1) % rt.vocab_size for token in propose(lookup, tokens, most)]

    with router_outputs(rt, shifted_logits), patch.object(Lookup, "propose", shifted_drafts):
        yield


def summary(runs: dict[Any, Any], times: dict[str, list[list[float]]], texts: int) -> dict[str, Any]:
    """Speeds and ratios, from each text's median over the rounds, summed over the texts."""
    plain, drafts, alone = (np.median(times[way], axis=0) for way in ("plain", "drafts", "alone"))
    drafted = sum(runs[number, "drafts"]["drafted"] for number in range(texts))
    experts = [runs[number, "drafts"]["experts"] for number in range(texts)]
    return {
        "plain": float(1 / plain.mean()),
        "drafts": float(1 / drafts.mean()),
        "ratio": float(plain.sum() / drafts.sum()),
        "slowest": float((plain / drafts).min()),
        "ratios": (plain / drafts).tolist(),
        "alone": float(alone.sum() / drafts.sum()),
        "drafted": drafted,
        "acceptance": sum(runs[number, "drafts"]["accepted"] for number in range(texts)) / max(drafted, 1),
        "switches": float(np.mean([a != b for names in experts for a, b in pairwise(names)])),
        "parted": sum(runs[number, "plain"]["ids"] != runs[number, "drafts"]["ids"] for number in range(texts)),
        "texts": texts,
    }


if __name__ == "__main__":
    typer.run(main)
