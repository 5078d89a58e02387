"""What serving costs: `python -m benchmarks.serving BUNDLE [--precision int8] [--tokens 64] [--rounds 9] [--clients 1,4,16]`.

One streamed request over HTTP beside `generate` of the same runtime, by turns: the median ratio of their tokens per
second, first token included. Then so many clients at once, each of which asks `--rounds` times: time to first token and
time per token behind it, p50 and p95, and tokens per second of all together. Client and server share the machine.
"""

import argparse
import json
import statistics
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.serve.app import create_app
from fusionroute.runtime.serve.server import address, bound
from fusionroute.runtime.serve.settings import Settings

MODEL, PROMPT = "measured", "The three most important things about the sea are"


@dataclass
class Times:
    """Seconds of many requests. first: from the request on; each: between tokens."""

    first: list[float] = field(default_factory=list)
    each: list[float] = field(default_factory=list)
    tokens: int = 0


def ask(client: httpx.Client, tokens: int, times: Times, prompt: str = PROMPT) -> None:
    """One streamed request to its end."""
    body: dict[str, Any] = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    last = begin = time.perf_counter()
    with client.stream("POST", "/v1/completions", json=body | {"fusionroute": {"routing": True}}) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: {") or not json.loads(line[6:])["choices"][0]["fusionroute"]["tokens"]:
                continue
            now = time.perf_counter()
            (times.first if last == begin else times.each).append(now - last)
            last = now
            times.tokens += 1


def compare(runtime: FusionRuntime, client: httpx.Client, tokens: int, rounds: int) -> None:
    """One request beside `generate`."""
    ratios, speeds = [], []
    for number in range(rounds + 1):
        seconds = {}
        for way in ("generate", "request") if number % 2 else ("request", "generate"):
            begin = time.perf_counter()
            if way == "generate":
                assert len(runtime.generate(PROMPT, tokens, ignore_eos=True).token_ids) == tokens
            else:
                ask(client, tokens, Times())
            seconds[way] = time.perf_counter() - begin
        if number:  # the first round warms both
            ratios.append(seconds["generate"] / seconds["request"])
            speeds.append(tokens / seconds["request"])
    print(
        f"one request: {statistics.median(speeds):.1f} tokens/s, {statistics.median(ratios):.3f} of generate "
        f"(rounds from {min(ratios):.3f} to {max(ratios):.3f})"
    )


def crowd(url: str, tokens: int, rounds: int, count: int) -> None:
    """`count` clients at once."""
    times = [Times() for _ in range(count)]

    def run(own: Times, number: int) -> None:
        with httpx.Client(base_url=url, timeout=None) as client:
            for _ in range(rounds):
                ask(client, tokens, own, f"{number}. {PROMPT}")

    threads = [threading.Thread(target=run, args=(own, number)) for number, own in enumerate(times)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begin
    first, each = (np.array([second for own in times for second in getattr(own, name)]) * 1000 for name in ("first", "each"))
    figures = "  ".join(
        f"{name} p50 {np.percentile(all_of_them, 50):.0f} ms, p95 {np.percentile(all_of_them, 95):.0f} ms"
        for name, all_of_them in (("first token", first), ("each token", each))
    )
    print(f"{count:>3} clients: {figures}  {sum(own.tokens for own in times) / seconds:.1f} tokens/s")


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clients", default="")
    parser.add_argument("--sessions", type=int, default=4)
    given = parser.parse_args()
    settings = Settings(MODEL, port=0, sessions=given.sessions)
    runtime = FusionRuntime.load(given.bundle, given.precision, "cpu", prefix_cache=given.sessions)
    listening = bound(settings)
    server = uvicorn.Server(uvicorn.Config(create_app(runtime, settings), log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    url = f"http://{address(listening)}"
    try:
        with httpx.Client(base_url=url, timeout=None) as client:
            compare(runtime, client, given.tokens, given.rounds)
        for count in filter(None, given.clients.split(",")):
            crowd(url, given.tokens, given.rounds, int(count))
    finally:
        server.should_exit = True
        thread.join()


if __name__ == "__main__":
    main()
