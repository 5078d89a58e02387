"""What a long text costs: time per token, memory of sessions, and the pause when an expert has to catch up.

Writes JSON and a chart.

python -m benchmarks.length BUNDLE --out DIR [--precision int8]      a bundle exported with --max-seq-len 8192

The chart shows each figure beside its arithmetic: every token reads all keys and values of the text, and each model
that ran caches them once.
"""

import gc
import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.real_text import language_reference
from benchmarks.router_outputs import router_outputs
from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.backend import Output
from fusionroute.runtime.bench.bandwidth import of_host
from fusionroute.runtime.process_memory import resident

LENGTHS = (256, 1024, 4096, 8192)
MEMORY_LENGTHS = (512, 1536)
STEPS, ROUNDS = 12, 3
SLEEP = 2000  # tokens for which an expert is not asked


def main(
    bundle: Annotated[Path, typer.Argument(help="A bundle with a context of 8192 tokens.")],
    out: Annotated[Path, typer.Option(help="Folder of length.json and length.png.")],
    precision: Annotated[str, typer.Option(help="Precision to load.")] = "int8",
) -> None:
    """Measure time per token, memory and catching up."""
    out.mkdir(parents=True, exist_ok=True)
    with Progress(console=Console(stderr=True)) as progress:
        with FusionRuntime.load(bundle, precision, "cpu", prefix_cache=0) as rt:
            ids = rt.encode(language_reference())
            spec = rt.bundle.manifest.models[0]
            token_bytes = spec.layers * 2 * spec.kv_heads * spec.head_size * 4
            lengths = [min(length, rt.max_seq_len) - STEPS * (ROUNDS + 1) for length in LENGTHS if length <= rt.max_seq_len]
            figures: dict[str, Any] = {"bytes_per_token": token_bytes, "bandwidth": of_host().bytes_per_second}
            figures["steps"] = steps(rt, ids, lengths, progress)
            figures["memory"] = memory(rt, ids, progress)
        figures["waking"] = {mode: waking(bundle, precision, ids, mode, progress) for mode in ("lazy", "background")}
    (out / "length.json").write_text(json.dumps(figures, indent=1) + "\n")
    draw(figures, out / "length.png")
    Console().print_json(json.dumps(figures))


def steps(rt: FusionRuntime, ids: list[int], lengths: list[int], progress: Progress) -> list[dict[str, float]]:
    """Median time of decode steps after texts of several lengths, in turns.

    The router and one expert have read the text.
    """
    task = progress.add_task("steps by length", total=len(lengths) * (ROUNDS + 1))
    sessions = []
    for length in lengths:
        session = rt.session(expert=rt.expert_names[0])
        session.append(ids[:length])
        session.step()
        sessions.append(session)
        progress.advance(task)
    times: list[list[float]] = [[] for _ in lengths]
    for _ in range(ROUNDS):
        for session, seconds in zip(sessions, times, strict=True):
            for _ in range(STEPS):
                start = time.perf_counter()
                session.step()
                seconds.append(time.perf_counter() - start)
            progress.advance(task)
    return [{"length": length, "ms": float(np.median(seconds)) * 1e3} for length, seconds in zip(lengths, times, strict=True)]


def memory(rt: FusionRuntime, ids: list[int], progress: Progress) -> list[dict[str, int]]:
    """Private memory of 1, 2 and 4 sessions, each with a text that the router and one expert have read."""
    rows = []
    for length in MEMORY_LENGTHS:
        sessions: list[Any] = []
        gc.collect()  # frees the sessions of the previous length
        before = resident().anonymous
        for count in (1, 2, 4):
            while len(sessions) < count:
                sessions.append(rt.session(expert=rt.expert_names[0]))
                sessions[-1].append(ids[:length])
                sessions[-1].step()
            rows.append({"length": length, "sessions": count, "bytes": resident().anonymous - before})
            progress.console.print(f"{count} sessions of {length} tokens: {rows[-1]['bytes'] / 1e6:.0f} MB")
    return rows


def waking(bundle: Path, precision: str, ids: list[int], mode: str, progress: Progress) -> dict[str, float]:
    """Time of the first step that asks an expert which has missed SLEEP tokens, and the median of the steps before."""
    task = progress.add_task(f"waking, {mode}", total=SLEEP)
    with FusionRuntime.load(bundle, precision, "cpu", catch_up=mode, prefix_cache=0) as rt, ExitStack() as stack:
        expert = 0

        def choose_expert(output: Output) -> Output:
            assert output.routing is not None
            return output._replace(routing=np.eye(len(rt.expert_names), dtype=np.float32)[[expert] * len(output.routing)])

        stack.enter_context(router_outputs(rt, choose_expert))
        session = rt.session()
        session.append(ids[:64])
        seconds = []
        for _ in range(SLEEP):
            start = time.perf_counter()
            session.step()
            seconds.append(time.perf_counter() - start)
            progress.advance(task)
        lag = session.lags[rt.expert_names[1]]
        expert = 1
        start = time.perf_counter()
        session.step()
        pause = time.perf_counter() - start
    return {
        "pause_ms": pause * 1e3,
        "lag": lag,
        "usual_ms": float(np.median(seconds[100:])) * 1e3,
        "p99_ms": float(np.percentile(seconds[100:], 99)) * 1e3,
    }


def draw(figures: dict[str, Any], path: Path) -> None:
    """Three panels: steps, memory, pauses."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    lengths = [row["length"] for row in figures["steps"]]
    left.plot(lengths, [row["ms"] for row in figures["steps"]], "o-", label="measured")
    base, per_token = figures["steps"][0], 2 * figures["bytes_per_token"] / figures["bandwidth"] * 1e3
    left.plot(
        lengths,
        [base["ms"] + (length - base["length"]) * per_token for length in lengths],
        "--",
        label="keys and values at memory bandwidth",
    )
    left.set(xlabel="tokens of text", ylabel="ms per token", title="Time of a token, by length of the text", ylim=(0, None))
    left.legend()
    for length in sorted({row["length"] for row in figures["memory"]}):
        rows = [row for row in figures["memory"] if row["length"] == length]
        counts = [row["sessions"] for row in rows]
        line = middle.plot(counts, [row["bytes"] / 1e6 for row in rows], "o-", label=f"{length} tokens each")[0]
        arithmetic = [2 * count * length * figures["bytes_per_token"] / 1e6 for count in counts]
        middle.plot(counts, arithmetic, "--", color=line.get_color(), alpha=0.6)
    middle.set(xlabel="sessions", ylabel="MB (dashed: arithmetic)", title="Memory of sessions", ylim=(0, None))
    middle.legend()
    modes = list(figures["waking"])
    right.bar(modes, [figures["waking"][mode]["pause_ms"] for mode in modes])
    right.set(ylabel="ms", title=f"Pause for an expert that missed {SLEEP:,} tokens")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    typer.run(main)
