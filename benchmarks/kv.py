"""What keys and values in fewer bits lose and gain: bundles of one system that differ in `--kv` alone, side by side.

python -m benchmarks.kv loss fp32=BUNDLE int8=BUNDLE … [--tokens 20480]       against the first one
python -m benchmarks.kv steps fp32=BUNDLE int8=BUNDLE … [--lengths 256,1024,4096]

Both print a table, with --json figures. The text is Python's language reference, in documents of 2,048 tokens, or random
ids where a bundle has no tokenizer. Run `steps` on an idle machine: its rounds interleave the bundles.
"""

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.real_text import language_reference
from fusionroute.fr_export.verify.metrics import Differences, differences, summarise
from fusionroute.fr_export.verify.torch_reference import Reference
from fusionroute.runtime import FusionRuntime

DOCUMENT = 2048  # tokens
STEPS, ROUNDS = 8, 5
Bundles = Annotated[list[str], typer.Argument(help="NAME=BUNDLE, the one that the others are held against first.")]
Precision = Annotated[str, typer.Option(help="Precision to load.")]
Json = Annotated[bool, typer.Option("--json", help="Print figures as one JSON object.")]
app = typer.Typer(help=__doc__)


def opened(bundles: Sequence[str], precision: str, stack: ExitStack) -> dict[str, FusionRuntime]:
    """The bundles by name."""
    named = dict(each.split("=", 1) for each in bundles)
    return {name: stack.enter_context(FusionRuntime.load(Path(path), precision, "cpu", prefix_cache=0)) for name, path in named.items()}


def text_of(rt: FusionRuntime, tokens: int) -> list[int]:
    """So many tokens of text; random ids where nothing can be encoded."""
    if "tokenizer.json" in rt.bundle.manifest.files:
        return rt.encode(language_reference())[:tokens]
    ids: list[int] = np.random.default_rng(0).integers(3, rt.vocab_size, tokens).tolist()
    return ids


@app.command()
def loss(
    bundles: Bundles,
    precision: Precision = "fp32",
    tokens: Annotated[int, typer.Option(help="Tokens of text.")] = 20_480,
    document: Annotated[int, typer.Option(help="Tokens of a document.")] = DOCUMENT,
    as_json: Json = False,
) -> None:
    """Differences of the fused distribution from that of the first bundle."""
    with ExitStack() as stack, Progress(console=Console(stderr=True)) as progress:
        runtimes = opened(bundles, precision, stack)
        first, *others = runtimes
        ids = text_of(runtimes[first], tokens)
        task = progress.add_task("tokens", total=len(ids))
        parts: dict[str, list[Differences]] = {name: [] for name in others}
        for start in range(0, len(ids), document):
            piece = ids[start : start + document]
            scores = runtimes[first].score(piece)
            expected = Reference(np.array(scores.logits), np.array(scores.routing), np.array(scores.experts))
            for name, own in parts.items():
                scores = runtimes[name].score(piece)
                own.append(differences(np.asarray(scores.logits), np.asarray(scores.experts), expected, piece))
            progress.advance(task, len(piece))
        figures: dict[str, Any] = {name: summarise(own) for name, own in parts.items()}
    rows = [
        (
            name, f"{own['perplexity_ratio'] - 1:+.3%} ± {own['perplexity_error']:.3%}", f"{own['kl_mean']:.1e}",
            f"{own['greedy_agreement']:.2%}", f"{own['routing_agreement']:.2%}",
        )
        for name, own in figures.items()
    ]  # fmt: skip
    show(f"{len(ids)} tokens, against {first}", ("KV", "perplexity", "KL", "top-1", "routing"), rows, figures, as_json)


@app.command()
def steps(
    bundles: Bundles,
    precision: Precision = "int8",
    lengths: Annotated[str, typer.Option(help="Comma list of lengths of text.")] = "256,1024,4096",
    as_json: Json = False,
) -> None:
    """Median time of a token behind texts of several lengths, which the router and one expert have read."""
    with ExitStack() as stack, Progress(console=Console(stderr=True)) as progress:
        runtimes = opened(bundles, precision, stack)
        sizes = [int(length) for length in lengths.split(",")]
        ids = text_of(next(iter(runtimes.values())), max(sizes))
        task = progress.add_task("steps", total=len(sizes) * (len(runtimes) + ROUNDS))
        figures: dict[str, Any] = {}
        for length in sizes:
            sessions = {}
            for name, rt in runtimes.items():
                sessions[name] = rt.session(expert=rt.expert_names[0])
                sessions[name].append(ids[:length])
                sessions[name].step()
                progress.advance(task)
            seconds: dict[str, list[float]] = {name: [] for name in runtimes}
            for _ in range(ROUNDS):
                for name, session in sessions.items():
                    for _ in range(STEPS):
                        begun = time.perf_counter()
                        session.step()
                        seconds[name].append(time.perf_counter() - begun)
                progress.advance(task)
            figures[str(length)] = {name: float(np.median(own)) * 1e3 for name, own in seconds.items()}
    rows = [(length, *(f"{ms:.2f}" for ms in own.values())) for length, own in figures.items()]
    show("ms per token", ("tokens of text", *runtimes), rows, figures, as_json)


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], figures: dict[str, Any], as_json: bool) -> None:
    """Print a table, or the figures."""
    if as_json:
        print(json.dumps(figures))
        return
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    Console(width=100).print(table)


if __name__ == "__main__":
    app()
