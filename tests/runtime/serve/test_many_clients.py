"""Many clients at once: none gets another's text, each text is that of a run alone, and memory does not grow."""

import random
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from fusionroute.runtime import FusionRuntime
from tests.support.server import MODEL, Served, events, served, wait_until


class Clients:
    """Clients that each send requests of all kinds; `texts` are what a run alone gives."""

    def __init__(self, server: Served, texts: dict[tuple[str, int], str]):
        self._server, self._texts, self._keys = server, texts, sorted(texts)
        self.counts = dict.fromkeys(("whole", "streamed", "left", "full"), 0)
        self.faults: list[str] = []
        self._lock = threading.Lock()

    def run(self, seed: int, requests: int | None, seconds: float = 1e9) -> None:
        chance, end = random.Random(seed), time.monotonic() + seconds
        with httpx.Client(base_url=self._server.url, timeout=120) as client:
            while time.monotonic() < end and requests != 0:
                requests = None if requests is None else requests - 1
                try:
                    kind = self._one(client, chance)
                except Exception as error:
                    self.faults.append(repr(error))
                    return
                with self._lock:
                    self.counts[kind] += 1

    def _one(self, client: httpx.Client, chance: random.Random) -> str:
        prompt, seed = chance.choice(self._keys)
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 12, "temperature": 0.9, "seed": seed, "ignore_eos": True}
        if chance.random() < 0.4:
            answer = client.post("/v1/completions", json=body)
            if answer.status_code == 429:
                time.sleep(0.05)
                return "full"
            self._check(prompt, seed, answer.json()["choices"][0]["text"], whole=True)
            return "whole"
        leave = chance.randrange(1, 10) if chance.random() < 0.4 else None
        with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
            if answer.status_code == 429:
                time.sleep(0.05)
                return "full"
            text = ""
            for number, event in enumerate(events(answer.iter_lines())):
                text += event["choices"][0]["text"]
                if number == leave:
                    break
        self._check(prompt, seed, text, whole=leave is None)
        return "left" if leave is not None else "streamed"

    def _check(self, prompt: str, seed: int, text: str, whole: bool) -> None:
        expected = self._texts[prompt, seed]
        if text != expected if whole else not expected.startswith(text):
            self.faults.append(f"{prompt!r}, seed {seed}: {text!r} instead of {expected!r}")


def texts_of(rt: FusionRuntime) -> dict[tuple[str, int], str]:
    prompts = ["12+30=", "print(", "Once upon a time", "12+31=", "x" * 40]
    options: Any = {"temperature": 0.9, "ignore_eos": True}
    return {(prompt, seed): rt.generate(prompt, 12, seed=seed, **options).text for prompt in prompts for seed in range(3)}


def run(server: Served, rt: FusionRuntime, count: int, requests: int | None, seconds: float = 1e9) -> Clients:
    clients = Clients(server, texts_of(rt))
    threads = [threading.Thread(target=clients.run, args=(seed, requests, seconds)) for seed in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clients.faults == []
    wait_until(lambda: server.idle)
    return clients


def test_six_clients(server: Served, rt: FusionRuntime) -> None:
    clients = run(server, rt, 6, 4)
    assert sum(clients.counts.values()) == 24 and clients.counts["full"] == 0 and min(clients.counts["whole"], clients.counts["left"]) > 0


@pytest.mark.slow
def test_thirty_two_clients_for_two_minutes(bundles: list[Path], rt: FusionRuntime) -> None:
    """Memory is measured after each eighth of the time: the first one warms, whatever touches its pages late."""
    sizes = []
    with served(FusionRuntime.load(bundles[0], precision="fp32", prefix_cache=4), sessions=4, queue=20) as server:
        run(server, rt, 32, 20)  # warm
        counts = Counter[str]()
        for _ in range(8):
            counts.update(run(server, rt, 32, None, 15).counts)
            sizes.append(psutil.Process().memory_info().rss)
    grown = sizes[-1] / sizes[0] - 1
    print(f"{dict(counts)}; MB: {', '.join(f'{size / 1e6:.1f}' for size in sizes)}; {grown:+.2%} behind the first 15 s")
    assert min(counts.values()) > 10 and grown < 0.02
