"""What a fused token of a system with one base costs beside one model: each runtime in a process of its own, in turns.

python -m benchmarks.shared_base_speed SHARED WHOLE [--precision int8 --steps 40 --rounds 3 --context 200]

SHARED: a bundle with one base; WHOLE: the same router in a bundle of whole models. Rows: the router of WHOLE alone
(lam=1); SHARED with a named expert; SHARED as its head chooses, from the first token that it is free to choose. The last
one is also run without passes of more than one expert. Means (a token of two passes takes twice as long as its
neighbours) and medians of all steps, and the means' ratios to the first row by rounds. Of two runtimes in one process the
second is up to 18 % faster: so no two are. Run it on an idle machine.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any, NamedTuple
from unittest.mock import patch

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.machine import cores, processor
from fusionroute.runtime.manifest import Manifest
from fusionroute.runtime.speculation import pass_prices

SETTLING = 16  # steps that are not counted: who reads along is learnt from them


class Kind(NamedTuple):
    """One row: its name, whether it is of the shared bundle, options of the session, whether experts may read along."""

    name: str
    shared: bool
    options: dict[str, Any]
    along: bool = True


def kinds(expert: str) -> list[Kind]:
    """The rows of the table."""
    return [
        Kind("the router alone", False, {"lam": 1.0}),
        Kind(f"one base, {expert}", True, {"expert": expert}),
        Kind("one base, any expert", True, {}),
        Kind("the same, one expert a pass", True, {}, along=False),
    ]


def steps(bundle: Path, precision: str, kind: Kind, count: int, context: int) -> dict[str, Any]:
    """Seconds of each step, and the share of tokens with another expert than the one before."""
    with patch.object(pass_prices, "prices_of", pass_prices.prices_of if kind.along else lambda *_: None):
        rt = FusionRuntime.load(bundle, precision, "cpu", prefix_cache=0, trusted=True)
    with rt:
        session = rt.session(**kind.options)
        session.append(np.random.default_rng(0).integers(3, rt.vocab_size, context).tolist())
        experts = [session.step().expert for _ in range(SETTLING)]
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            token = session.step()
            seconds.append(time.perf_counter() - start)
            experts.append(token.expert)
    switches = float(np.mean([a != b for a, b in zip(experts[SETTLING:], experts[SETTLING - 1 :], strict=False)]))
    return {"seconds": seconds, "switches": switches}


def main(
    shared: Path,
    whole: Path,
    precision: str = "int8",
    count: Annotated[int, typer.Option("--steps")] = 40,
    rounds: int = 3,
    context: int = 200,
    row: Annotated[int, typer.Option(hidden=True)] = -1,
) -> None:
    """Print the table."""
    rows = kinds(Manifest.read(shared).experts[0])
    if row >= 0:
        print(json.dumps(steps(shared if rows[row].shared else whole, precision, rows[row], count, context)))
        return
    arguments = [str(shared), str(whole), "--precision", precision, "--steps", str(count), "--context", str(context)]
    results: dict[int, list[dict[str, Any]]] = {number: [] for number in range(len(rows))}
    for _ in range(rounds):
        for number, each in results.items():
            command = [sys.executable, "-m", "benchmarks.shared_base_speed", *arguments, "--row", str(number)]
            each.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    table = Table(
        "",
        "ms a token",
        "median",
        "of the router's speed, by round",
        "switches",
        title=f"{processor()[0].rpartition(': ')[2]}, {cores()} cores, {precision}",
    )
    for number, each in results.items():
        ratios = [mean(first["seconds"]) / mean(run["seconds"]) for first, run in zip(results[0], each, strict=True)]
        every = [seconds for run in each for seconds in run["seconds"]]
        table.add_row(
            rows[number].name, f"{1e3 * mean(every):.1f}", f"{1e3 * median(every):.1f}", f"{median(ratios):.2f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)})",
            f"{mean(run['switches'] for run in each):.2f}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
