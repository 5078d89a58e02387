"""What a host process pays: loading, the first token, memory, the GIL, cancellation and deadlines. Prints tables.

python -m benchmarks.embedding BUNDLE [--precision int8,int4,fp32]

BUNDLE must write long texts, as SmolLM2 does; the shipped systems end theirs too early.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from statistics import median
from typing import Any

import psutil

PROMPT = "The capital of France is a city of"
TOKENS, LOADS, ROUNDS = 24, 3, 5


def proportional_memory() -> int:
    """Memory of this process in MiB, where a shared page is divided among the processes that map it (PSS)."""
    return int(psutil.Process().memory_full_info().pss) >> 20


def say(**figures: Any) -> None:
    """Print one line of JSON for the process that started this one."""
    print(json.dumps(figures), flush=True)


def serve(bundle: str, precision: str, shared: str, threads: str) -> None:
    """Load, then measure on demand: each line on stdin is answered by a line on stdout."""
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
            begin, cpu_begin = time.perf_counter(), time.process_time()
            count = len(rt.generate(PROMPT, TOKENS).token_ids)
            say(tokens=count / (time.perf_counter() - begin), per_cpu=count / (time.process_time() - cpu_begin))
        elif command == "memory":
            say(pss=proportional_memory())
        elif command.startswith("count"):
            say(**count_loops(rt, command == "count beside"))
        elif command == "stop":
            say(**measure_stops(rt))


def count_loops(rt: Any, beside: bool) -> dict[str, float]:
    """Counts per second of a pure-Python loop; `beside`: while another thread of this process generates."""
    over, tokens = threading.Event(), []
    worker = threading.Thread(target=lambda: tokens.extend(rt.stream(PROMPT, 900, cancel=over)))
    if beside:
        worker.start()
    number, start = 0, time.perf_counter()
    while number % 1000 or time.perf_counter() - start < 2.0:
        number += 1
    seconds = time.perf_counter() - start
    over.set()
    if beside:
        worker.join()
    return {"counts": number / seconds, "tokens": len(tokens) / seconds}


def measure_stops(rt: Any) -> dict[str, float]:
    """Time from a cancellation or a deadline to the end of the text, in token times.

    `in_prompt`: the same for a deadline that falls into the reading of a prompt of 512 tokens.
    """

    def seconds_of(prompt: Any, count: int, **options: Any) -> float:
        start = time.perf_counter()
        rt.generate(prompt, count, **options)
        return time.perf_counter() - start

    token = seconds_of(PROMPT, TOKENS) / TOKENS
    after_cancel, after_deadline, after_deadline_in_prompt = [], [], []
    for _ in range(ROUNDS):
        cancel, times = threading.Event(), list[float]()

        def stop(cancel: threading.Event = cancel, times: list[float] = times) -> None:
            times.append(time.perf_counter())
            cancel.set()

        threading.Timer(7.5 * token, stop).start()
        rt.generate(PROMPT, 900, cancel=cancel)
        after_cancel.append((time.perf_counter() - times[0]) / token)
        after_deadline.append(seconds_of(PROMPT, 900, deadline=7.5 * token) / token - 7.5)
        after_deadline_in_prompt.append(seconds_of([5] * 512, 2, deadline=2 * token) / token - 2)
    return {
        "token_ms": token * 1e3,
        "cancel": median(after_cancel),
        "deadline": median(after_deadline),
        "in_prompt": median(after_deadline_in_prompt),
    }


class Process:
    """Another process that has loaded the bundle."""

    def __init__(self, *arguments: str):
        command = [sys.executable, "-m", "benchmarks.embedding", "--serve", *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.start = self.receive()

    def send(self, command: str) -> None:
        """Ask without waiting."""
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()

    def receive(self) -> dict[str, float]:
        """Wait for the next answer."""
        assert self._process.stdout is not None
        answer: dict[str, float] = json.loads(self._process.stdout.readline())
        return answer

    def ask(self, command: str) -> dict[str, float]:
        """Ask and wait."""
        self.send(command)
        return self.receive()

    def end(self) -> None:
        """Wait for its end."""
        self._process.communicate()


def rows(bundle: str, precision: str, threads: str) -> None:
    """Print one row for private and one for shared weights; loads and speeds of the two are measured in turns."""
    Process(bundle, precision, "1", threads).end()  # writes the shared weights
    starts: dict[str, list[dict[str, float]]] = {"0": [], "1": []}
    for _ in range(LOADS):
        for shared, runs in starts.items():
            process = Process(bundle, precision, shared, threads)
            runs.append(process.start)
            process.end()
    pairs = {shared: [Process(bundle, precision, shared, threads) for _ in range(2)] for shared in starts}
    alone = {}
    for shared, (first, second) in pairs.items():
        for process in (first, second):
            process.ask("speed")
        together = [process.ask("memory")["pss"] for process in (first, second)]
        second.end()
        alone[shared] = (first.ask("memory")["pss"], together)
    speeds: dict[str, list[dict[str, float]]] = {shared: [] for shared in starts}
    for _ in range(ROUNDS):
        for shared, (first, _second) in pairs.items():
            speeds[shared].append(first.ask("speed"))
    for shared, runs in starts.items():
        pairs[shared][0].end()
        best = {key: min(start[key] for start in runs) for key in runs[0]}
        ratio = median(start["cold"] / start["warm"] for start in runs)
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
    for _ in range(ROUNDS):  # nothing generates, then another process does, then another thread
        alone.append(one.ask("count"))
        other.send("count beside")
        apart.append(one.ask("count"))
        other.receive()
        beside.append(one.ask("count beside"))
    shares = (f"{median(b['counts'] / a['counts'] for a, b in zip(others, beside, strict=True)):.1%}" for others in (alone, apart))
    print("pure-Python counter beside a generating thread: {} of its speed alone, {} of that beside a generating process".format(*shares))
    other.end()
    print("stopping, in token times:", one.ask("stop"))
    one.end()


if __name__ == "__main__":
    serve(*sys.argv[2:]) if sys.argv[1:2] == ["--serve"] else main()
