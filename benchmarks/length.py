"""What a long text costs: milliseconds per token, memory of sessions, and the pause when an expert wakes late. Writes JSON and a chart.

python benchmarks/length.py BUNDLE --out DIR [--precision int8]      the bundle's context must hold the longest text (--max-seq-len 8192)

Each part beside its arithmetic: attention reads all keys and values of the text for every token, a cache holds them once per model that ran.
"""

import gc
import json
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.bench.bandwidth import of_host
from fusionroute.runtime.bench.memory import resident

LENGTHS = (256, 1024, 4096, 8192)
STEPS, ROUNDS, SLEEP = 12, 3, 2000


def main(
    bundle: Annotated[Path, typer.Argument(help="A bundle with a context of 8192 tokens.")],
    out: Annotated[Path, typer.Option(help="Folder of length.json and length.png.")],
    precision: Annotated[str, typer.Option(help="Precision to load.")] = "int8",
) -> None:
    """Measure all three."""
    out.mkdir(parents=True, exist_ok=True)
    with Progress(console=Console(stderr=True)) as progress:
        with FusionRuntime.load(bundle, precision, "cpu", prefix_cache=0) as rt:
            ids = rt.encode("\n\n".join(topics[name] for name in sorted(topics)))
            spec = rt.bundle.manifest.models[0]
            each = spec.layers * 2 * spec.kv_heads * spec.head_size * 4
            lengths = [min(length, rt.max_seq_len) - STEPS * (ROUNDS + 1) for length in LENGTHS if length <= rt.max_seq_len]
            found: dict[str, Any] = {"bytes_per_token": each, "bandwidth": of_host().bytes_per_second}
            found["steps"] = steps(rt, ids, lengths, progress)
            found["memory"] = memory(rt, ids, progress)
        found["waking"] = {mode: waking(bundle, precision, ids, mode, progress) for mode in ("lazy", "background")}
    (out / "length.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found, out / "length.png")
    Console().print_json(json.dumps(found))


def steps(rt: FusionRuntime, ids: list[int], lengths: list[int], progress: Progress) -> list[dict[str, float]]:
    """Medians of decode steps behind texts of several lengths, which take turns; router and one expert read the text."""
    task = progress.add_task("steps by length", total=len(lengths) * (ROUNDS + 1))
    sessions = []
    for length in lengths:
        session = rt.session(expert=rt.expert_names[0])
        session.append(ids[:length])
        session.step()
        sessions.append(session)
        progress.advance(task)
    taken: list[list[float]] = [[] for _ in lengths]
    for _ in range(ROUNDS):
        for session, seconds in zip(sessions, taken, strict=True):
            for _ in range(STEPS):
                start = time.perf_counter()
                session.step()
                seconds.append(time.perf_counter() - start)
            progress.advance(task)
    return [{"length": length, "ms": float(np.median(seconds)) * 1e3} for length, seconds in zip(lengths, taken, strict=True)]


def memory(rt: FusionRuntime, ids: list[int], progress: Progress) -> list[dict[str, int]]:
    """Private memory that sessions take, with a text each that the router and one expert have read."""
    found = []
    for length in (512, 1536):
        sessions: list[Any] = []
        gc.collect()  # the sessions of the length before
        before = resident().anonymous
        for count in (1, 2, 4):
            while len(sessions) < count:
                sessions.append(rt.session(expert=rt.expert_names[0]))
                sessions[-1].append(ids[:length])
                sessions[-1].step()
            found.append({"length": length, "sessions": count, "bytes": resident().anonymous - before})
            progress.console.print(f"{count} sessions of {length} tokens: {found[-1]['bytes'] / 1e6:.0f} MB")
    return found


def waking(bundle: Path, precision: str, ids: list[int], mode: str, progress: Progress) -> dict[str, float]:
    """The longest step where an expert answers for the first time after SLEEP tokens, and the median of the steps before."""
    task = progress.add_task(f"waking, {mode}", total=SLEEP)
    with FusionRuntime.load(bundle, precision, "cpu", catch_up=mode, prefix_cache=0) as rt:
        first, second = rt.expert_names[:2]
        session = rt.session(expert=first)
        session.append(ids[:64])
        usual = []
        for _ in range(SLEEP):
            start = time.perf_counter()
            session.step()
            usual.append(time.perf_counter() - start)
            progress.advance(task)
        lag = session.lags[second]
        session._pinned = 1
        start = time.perf_counter()
        session.step()
        pause = time.perf_counter() - start
    return {
        "pause_ms": pause * 1e3,
        "lag": lag,
        "usual_ms": float(np.median(usual[100:])) * 1e3,
        "p99_ms": float(np.percentile(usual[100:], 99)) * 1e3,
    }


def draw(found: dict[str, Any], path: Path) -> None:
    """Three panels: steps, memory, pauses."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    lengths = [row["length"] for row in found["steps"]]
    left.plot(lengths, [row["ms"] for row in found["steps"]], "o-", label="measured")
    base, each = found["steps"][0], 2 * found["bytes_per_token"] / found["bandwidth"] * 1e3
    left.plot(
        lengths, [base["ms"] + (length - base["length"]) * each for length in lengths], "--", label="keys and values at memory's speed"
    )
    left.set(xlabel="tokens of text", ylabel="ms per token", title="A token, by the text before it", ylim=(0, None))
    left.legend()
    for length in sorted({row["length"] for row in found["memory"]}):
        rows = [row for row in found["memory"] if row["length"] == length]
        counts = [row["sessions"] for row in rows]
        line = middle.plot(counts, [row["bytes"] / 1e6 for row in rows], "o-", label=f"{length} tokens each")[0]
        arithmetic = [2 * count * length * found["bytes_per_token"] / 1e6 for count in counts]
        middle.plot(counts, arithmetic, "--", color=line.get_color(), alpha=0.6)
    middle.set(xlabel="sessions", ylabel="MB (dashed: arithmetic)", title="Memory of texts", ylim=(0, None))
    middle.legend()
    modes = list(found["waking"])
    right.bar(modes, [found["waking"][mode]["pause_ms"] for mode in modes])
    right.set(ylabel="ms", title=f"An expert wakes after {SLEEP:,} tokens")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    typer.run(main)
