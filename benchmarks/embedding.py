"""What embedding costs on this machine: loading, the first token, memory of one and two processes, the GIL, cancellation and deadlines.

python benchmarks/embedding.py BUNDLE [--precision int8,int4,fp32]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

PROMPT = "The capital of France is a city of"
TOKENS, LOADS, ROUNDS = 24, 3, 5


def smaps() -> dict[str, int]:
    """Memory of this process in MiB: Pss (shared pages by the number of those who share them) and Private_Dirty."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return {key: int(re.search(rf"^{key}:\s+(\d+)", text, re.M)[1]) >> 10 for key in ("Pss", "Private_Dirty")}  # type: ignore[index]


def say(**found: Any) -> None:
    """One line of JSON to whoever started this process."""
    print(json.dumps(found), flush=True)


def serve(bundle: str, precision: str, shared: str, threads: str) -> None:
    """Load, then measure on demand: a line on stdin, a line on stdout."""
    start = time.perf_counter()
    from fusionroute.runtime import FusionRuntime

    imported, cpu = time.perf_counter() - start, time.process_time()
    start = time.perf_counter()
    rt = FusionRuntime.load(bundle, precision, "cpu", threads=int(threads), share_weights=shared == "1", prefix_cache=0)
    loaded, cpu = time.perf_counter() - start, time.process_time() - cpu

    def first() -> float:
        begin = time.perf_counter()
        stream = rt.stream(PROMPT, 2)
        next(stream)
        seconds = time.perf_counter() - begin
        stream.close()
        return seconds

    cold = first()
    say(imported=imported, loaded=loaded, cpu=cpu, cold=cold, warm=median(first() for _ in range(7)))
    for line in sys.stdin:
        command = line.strip()
        if command == "speed":
            begin, burnt = time.perf_counter(), time.process_time()
            count = len(rt.generate(PROMPT, TOKENS).token_ids)
            say(tokens=count / (time.perf_counter() - begin), per_cpu=count / (time.process_time() - burnt))
        elif command == "memory":
            say(**smaps())
        elif command.startswith("count"):
            say(**counted(rt, command == "count beside"))
        elif command == "stop":
            say(**stopped(rt))


def counted(rt: Any, beside: bool) -> dict[str, float]:
    """Counts per second of a pure-Python loop in this process, while another thread generates or none does."""
    over, made = threading.Event(), []
    worker = threading.Thread(target=lambda: [made.append(token) for token in rt.stream(PROMPT, 900, cancel=over)])
    if beside:
        worker.start()
    number, start = 0, time.perf_counter()
    while number % 1000 or time.perf_counter() - start < 2.0:
        number += 1
    seconds = time.perf_counter() - start
    over.set()
    if beside:
        worker.join()
    return {"counts": number / seconds, "tokens": len(made) / seconds}


def stopped(rt: Any) -> dict[str, float]:
    """How many token times pass between a cancellation, or a deadline, and the end; and the same within a prompt of 512 tokens."""
    start = time.perf_counter()
    token = (time.perf_counter() - start, rt.generate(PROMPT, TOKENS), time.perf_counter() - start)[2] / TOKENS
    cancels, overs, prompts = [], [], []
    for _ in range(ROUNDS):
        cancel, at = threading.Event(), [0.0]

        def ring(cancel: threading.Event = cancel, at: list[float] = at) -> None:
            at[0] = time.perf_counter()
            cancel.set()

        threading.Timer(7.5 * token, ring).start()
        rt.generate(PROMPT, 900, cancel=cancel)
        cancels.append((time.perf_counter() - at[0]) / token)
        begin = time.perf_counter()
        rt.generate(PROMPT, 900, deadline=7.5 * token)
        overs.append((time.perf_counter() - begin - 7.5 * token) / token)
        begin = time.perf_counter()
        rt.generate([5] * 512, 2, deadline=2 * token)
        prompts.append((time.perf_counter() - begin - 2 * token) / token)
    return {"token_ms": token * 1e3, "cancel": median(cancels), "deadline": median(overs), "in_prompt": median(prompts)}


class Process:
    """Another process with the bundle loaded."""

    def __init__(self, *arguments: str):
        command = [sys.executable, __file__, "--serve", *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.start: dict[str, float] = self._read()

    def _read(self) -> dict[str, float]:
        assert self._process.stdout is not None
        found: dict[str, float] = json.loads(self._process.stdout.readline())
        return found

    def send(self, command: str) -> None:
        """Ask without waiting."""
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()

    def ask(self, command: str) -> dict[str, float]:
        """Ask and wait."""
        self.send(command)
        return self._read()

    def end(self) -> None:
        """Let it end."""
        self._process.communicate()


def rows(bundle: str, precision: str, threads: str) -> None:
    """One row for private and one for shared weights; loads and speeds of the two take turns."""
    Process(bundle, precision, "1", threads).end()  # packs what is shared
    starts: dict[str, list[dict[str, float]]] = {"0": [], "1": []}
    for _ in range(LOADS):
        for shared, found in starts.items():
            process = Process(bundle, precision, shared, threads)
            found.append(process.start)
            process.end()
    pairs = {shared: [Process(bundle, precision, shared, threads) for _ in range(2)] for shared in starts}
    alone = {}
    for shared, (first, second) in pairs.items():
        for process in (first, second):
            process.ask("speed")
        together = [process.ask("memory")["Pss"] for process in (first, second)]
        second.end()
        alone[shared] = (first.ask("memory")["Pss"], together)
    speeds: dict[str, list[dict[str, float]]] = {shared: [] for shared in starts}
    for _ in range(ROUNDS):
        for shared, (first, _second) in pairs.items():
            speeds[shared].append(first.ask("speed"))
    for shared, found in starts.items():
        pairs[shared][0].end()
        best = {key: min(start[key] for start in found) for key in found[0]}
        ratio = median(start["cold"] / start["warm"] for start in found)
        tokens, per_cpu = (median(speed[key] for speed in speeds[shared]) for key in ("tokens", "per_cpu"))
        own, (one, other) = alone[shared]
        print(
            f"| {precision} | {'shared' if shared == '1' else 'private'} | {best['imported']:.2f} | {best['loaded']:.2f} ({best['cpu']:.2f}) "
            f"| {ratio:.2f} | {tokens:.1f} | {per_cpu:.1f} | {own} | {one}, {other} |",
            flush=True,
        )


def main() -> None:
    """Print one table as Markdown and the rest as lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--precision", default="int8,int4,fp32")
    parser.add_argument("--threads", default="2")
    arguments = parser.parse_args()
    print(
        "| precision | weights | import s | load s (CPU s) | first token, cold / warm | tokens/s | per CPU s | MiB alone | PSS of each of two |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for precision in arguments.precision.split(","):
        rows(arguments.bundle, precision, arguments.threads)
    first = arguments.precision.split(",")[0]
    one, other = (Process(arguments.bundle, first, "0", "1") for _ in range(2))
    alone, apart, beside = [], [], []
    for _ in range(ROUNDS):  # side by side: the generation runs in another process, then in another thread
        alone.append(one.ask("count"))
        other.send("count beside")
        apart.append(one.ask("count"))
        other._read()
        beside.append(one.ask("count beside"))
    shares = (f"{median(b['counts'] / a['counts'] for a, b in zip(found, beside, strict=True)):.1%}" for found in (alone, apart))
    print("pure-Python counter beside a generating thread: {} of its speed alone, {} of that beside a generating process".format(*shares))
    other.end()
    print("stopping, in token times:", one.ask("stop"))
    one.end()


if __name__ == "__main__":
    serve(*sys.argv[2:]) if sys.argv[1:2] == ["--serve"] else main()
