"""What serving costs: `python -m benchmarks.serving BUNDLE [--precision int8] [--tokens 64] [--rounds 9]`.

One streamed request over HTTP beside `generate` of the same runtime, by turns: the median ratio of their tokens per
second, first token included.

`--clients 1,4,16,32 [--requests 64] [--sessions 16] [--peer URL]` then lets so many clients send a request each at the
same moment, again and again, and prints a table: time to first token and time per token behind it, p50 and p95, and
tokens per second of all clients together. A peer is another server of OpenAI's protocol, such as llama.cpp's; the two
take turns. Clients are a process of their own, on the same machine as the servers.
"""

import argparse
import json
import statistics
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.serve.app import create_app
from fusionroute.runtime.serve.server import address, bound
from fusionroute.runtime.serve.settings import MOST_SESSIONS, Settings

MODEL, PROMPT = "measured", "The three most important things about the sea are"


@dataclass
class Load:
    """Seconds of many requests. first: from the request on; each: between tokens; wall: of all of them together."""

    first: list[float] = field(default_factory=list)
    each: list[float] = field(default_factory=list)
    wall: float = 0.0

    def add(self, other: "Load") -> None:
        """Take another one's requests too."""
        self.first += other.first
        self.each += other.each
        self.wall += other.wall

    @property
    def row(self) -> str:
        """The cells of a table: p50 and p95 in milliseconds, and tokens per second."""
        cells = [" / ".join(f"{np.percentile(np.array(seconds) * 1000, p):.0f}" for p in (50, 95)) for seconds in (self.first, self.each)]
        return " | ".join([*cells, f"{(len(self.first) + len(self.each)) / self.wall:.1f}"])


def ask(client: httpx.Client, tokens: int, load: Load, prompt: str = PROMPT, **fields: Any) -> None:
    """One streamed request to its end."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True, **fields}
    last = begin = time.perf_counter()
    with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if not line.startswith("data: {") or json.loads(line[6:])["choices"][0]["finish_reason"]:
                continue
            now = time.perf_counter()
            (load.first if last == begin else load.each).append(now - last)
            last = now


def compare(runtime: FusionRuntime, url: str, tokens: int, rounds: int) -> None:
    """One request with the routing of its tokens beside `generate`."""
    ratios, speeds = [], []
    with httpx.Client(base_url=url, timeout=None) as client:
        for number in range(rounds + 1):
            seconds = {}
            for way in ("generate", "request") if number % 2 else ("request", "generate"):
                begin = time.perf_counter()
                if way == "generate":
                    assert len(runtime.generate(PROMPT, tokens, ignore_eos=True).token_ids) == tokens
                else:
                    ask(client, tokens, Load(), fusionroute={"routing": True})
                seconds[way] = time.perf_counter() - begin
            if number:  # the first round warms both
                ratios.append(seconds["generate"] / seconds["request"])
                speeds.append(tokens / seconds["request"])
    print(
        f"One streamed request: {statistics.median(speeds):.1f} tokens/s, {statistics.median(ratios):.3f} of `generate` "
        f"(median of {rounds} rounds, from {min(ratios):.3f} to {max(ratios):.3f}).\n",
        flush=True,
    )


def burst(url: str, count: int, tokens: int, turn: int) -> Load:
    """`count` clients that send one request each at the same moment. No two prompts of a run begin alike."""
    loads, ready = [Load() for _ in range(count)], threading.Barrier(count + 1)
    limits = httpx.Limits(max_connections=None)

    def run(number: int) -> None:
        ready.wait()
        ask(client, tokens, loads[number], f"{turn}.{number}. {PROMPT}")

    with httpx.Client(base_url=url, timeout=None, limits=limits) as client:
        threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        ready.wait()
        begin = time.perf_counter()
        for thread in threads:
            thread.join()
    together = Load(wall=time.perf_counter() - begin)
    for load in loads:
        assert len(load.first) == 1, "a client got no answer"
        together.add(load)
    return together


def crowds(servers: dict[str, str], counts: list[int], tokens: int, requests: int) -> None:
    """So many clients at once, at servers by turns."""
    print("| clients | server | first token, ms (p50 / p95) | each token, ms (p50 / p95) | tokens/s |\n|--:|---|--:|--:|--:|")
    with ProcessPoolExecutor(1, get_context("spawn")) as clients:
        for count in counts:
            loads = {name: Load() for name in servers}
            for turn in range(1 + max(1, requests // count)):
                for name in sorted(servers, reverse=bool(turn % 2)):
                    load = clients.submit(burst, servers[name], count, tokens, turn).result()
                    if turn:  # the first one warms
                        loads[name].add(load)
            for name, load in loads.items():
                print(f"| {count} | {name} | {load.row} |", flush=True)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clients", default="")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--sessions", type=int, default=MOST_SESSIONS)
    parser.add_argument("--peer")
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
        if given.rounds:
            compare(runtime, url, given.tokens, given.rounds)
        if given.clients:
            servers = {"FusionRoute": url} | ({"peer": given.peer} if given.peer else {})
            crowds(servers, [int(count) for count in given.clients.split(",")], given.tokens, given.requests)
    finally:
        server.should_exit = True
        thread.join()


if __name__ == "__main__":
    main()
