"""What speculation gives on real texts: speed with drafts against speed without, acceptance, switches, and the worst case.

python benchmarks/speculation.py BUNDLE [BUNDLE …] --out FILE.json [--precision int8] [--each 12]

Texts: the built-in prompts (greedy, and sampled at temperature 0.7), prompts that ask for their own input again, and the built-in ones with
drafts that are all wrong (the router's logits, which do not count in the fusion then, and what the text offers are turned by one place). Every
text is generated without and with drafts, and by the first expert alone, in turns; one text of each kind warms up. Ratios are of the summed
times of all texts, since a short text tells little alone. "modelled": what the cost model of docs/speculation.md says of plain decoding, from
passes timed after every round, in multiples of what it took; on both sides the fastest of all rounds counts.
"""

import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fusionroute.calibration.prompts import BUILTIN
from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.backend import Output
from fusionroute.runtime.session import Session
from fusionroute.runtime.speculation import costs

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
    chosen = [BUILTIN[at] for at in np.linspace(0, len(BUILTIN) - 1, each).astype(int)]
    found: dict[str, Any] = {}
    with Progress(console=Console(stderr=True)) as progress:
        for bundle in bundles:
            found[bundle.name] = measure(bundle, precision, chosen, rounds, tokens, only, progress)
            out.write_text(json.dumps(found, indent=1) + "\n")
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
    for name, kinds in found.items():
        for kind, row in kinds.items():
            figures = (
                f"{row['plain']:.1f}",
                f"{row['modelled']:.2f}",
                f"{row['drafts']:.1f}",
                f"{row['ratio']:.2f}",
                f"{row['slowest']:.2f}",
            )
            table.add_row(
                name,
                kind,
                *figures,
                f"{row['alone']:.2f}",
                f"{row['acceptance']:.0%}",
                str(row["drafted"]),
                f"{row['switches']:.0%}",
                f"{row['parted']}/{row['texts']}",
            )
    Console(width=140).print(table)


def measure(bundle: Path, precision: str, chosen: list[str], rounds: int, tokens: int, only: str, progress: Progress) -> dict[str, Any]:
    """All kinds of texts on one bundle."""
    options: dict[str, Any] = {"precision": precision, "device": "cpu", "prefix_cache": 0}
    kinds: dict[str, tuple[Any, dict[str, Any], bool]] = {
        "built-in, greedy": (chosen, {}, False),
        "built-in, sampled": (chosen, {"temperature": 0.7, "seed": 1}, False),
        "repeating, greedy": (REPEATING, {}, False),
        "all drafts wrong": (chosen, {"lam": 0.0}, True),
    }
    found = {}
    with FusionRuntime.load(bundle, **options) as plain, FusionRuntime.load(bundle, speculation="auto", **options) as drafting:
        for kind, (texts, sampling, wrong) in kinds.items():
            if only not in kind:
                continue
            task = progress.add_task(f"{bundle.name}: {kind}", total=len(texts) * rounds)
            ways = {"plain": (plain, None), "drafts": (drafting, None), "alone": (plain, plain.expert_names[0])}
            for rt, expert in ways.values():
                generate(rt, texts[0], tokens, sampling, wrong, expert)
            taken: dict[str, list[list[float]]] = {way: [] for way in ways}
            runs, known = {}, []
            for _ in range(rounds):
                for seconds in taken.values():
                    seconds.append([])
                for number, text in enumerate(texts):
                    for way, (rt, expert) in ways.items():
                        each, runs[number, way] = generate(rt, text, tokens, sampling, wrong, expert)
                        taken[way][-1].append(each)
                    progress.advance(task)
                known.append(costs.measure(plain.bundle, plain.backend))  # in the same minutes: machines change their speed
            found[kind] = summary(runs, taken, len(texts))
            modelled = sum(model(fastest(known), runs[number, "plain"], plain.expert_names) for number in range(len(texts)))
            found[kind]["modelled"] = modelled / float(np.min(taken["plain"], axis=0).sum())
            progress.remove_task(task)
    return found


def generate(
    rt: FusionRuntime, text: str, count: int, sampling: dict[str, Any], wrong: bool, expert: str | None
) -> tuple[float, dict[str, Any]]:
    """Seconds per token of one text after its first token, and what came out. Texts go on behind their end. `expert` alone, if any."""
    session = rt.session(expert=expert, lam=sampling.get("lam") if expert is None else 0.0)
    if wrong and expert is None:
        mislead(session, rt)
    options = {name: value for name, value in sampling.items() if name != "lam"}
    session.append(rt.encode(text)[: rt.max_seq_len - count - 8])
    tokens = session.steps(1, **options)
    start = time.perf_counter()
    while len(tokens) < count:
        tokens += session.steps(count - len(tokens), **options)
    seconds = time.perf_counter() - start
    rounds = session.rounds
    return seconds / (count - 1), {
        "prompt": len(session) - count,
        "ids": [token.id for token in tokens],
        "experts": [token.expert for token in tokens],
        "drafted": rounds.drafted if rounds else 0,
        "accepted": rounds.accepted if rounds else 0,
    }


def fastest(known: list[costs.Costs]) -> costs.Costs:
    """The least of each figure."""
    router, *experts = (
        costs.passes(np.min([(each.router, *each.experts)[number] for each in known], axis=0))
        for number in range(1 + len(known[0].experts))
    )
    return costs.Costs(router, tuple(experts), min(each.fusion for each in known))


def model(known: costs.Costs, run: dict[str, Any], names: list[str]) -> float:
    """Seconds per token of one text by the cost model of plain decoding: the router reads a token, an expert all that it has missed."""
    read = dict.fromkeys(names, 0)
    total = 0.0
    for number, name in enumerate(run["experts"]):
        length = run["prompt"] + number
        missed, read[name] = length - read[name], length
        if number:  # the first token is not timed
            router, expert = costs.table(known.router, length), costs.table(known.experts[names.index(name)], length)
            beyond = max(missed - costs.MOST, 0) * (expert[costs.MOST] - expert[costs.MOST // 2]) / (costs.MOST // 2)
            total += router[1] + expert[min(missed, costs.MOST)] + beyond + known.fusion
    return total / (len(run["experts"]) - 1)


def mislead(session: Session, rt: FusionRuntime) -> None:
    """Turn the router's logits, and what the text offers, by one place, so that no draft is what the expert says."""
    cache = rt.backend.router.cache()
    forward = cache.forward

    def turned(ids: Any, positions: Any) -> Output:
        answer = forward(ids, positions)
        return Output(np.roll(answer.logits, 1, axis=-1), answer.routing)

    cache.forward = turned  # type: ignore[method-assign]
    session._router = cache
    if session.rounds is not None:
        lookup = session.rounds._lookup
        propose = lookup.propose
        lookup.propose = lambda tokens, most: [(token + 1) % rt.vocab_size for token in propose(tokens, most)]  # type: ignore[method-assign]


def summary(runs: dict[Any, Any], taken: dict[str, list[list[float]]], texts: int) -> dict[str, Any]:
    """Medians over the rounds of each text's time; sums over the texts."""
    plain, drafts, alone = (np.median(taken[way], axis=0) for way in ("plain", "drafts", "alone"))
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
