"""Clients of all kinds that go on while replicas die, and what happened to each of their requests."""

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from tests.support.server import MODEL, events, wait_until

TOKENS = 40


@dataclass(frozen=True)
class Outcome:
    """One request. kind: "whole", "streamed" or "cut"; attempt: replicas that it was sent to; times of time.monotonic."""

    kind: str
    attempt: int
    replica: str
    begin: float
    end: float


class Load:
    """Clients that check each text against `texts`, by prompt and seed."""

    def __init__(self, url: str, texts: dict[tuple[str, int], str]):
        self._url, self._texts, self._keys = url, texts, sorted(texts)
        self.outcomes: list[Outcome] = []
        self.faults: list[str] = []
        self._stop = threading.Event()

    @contextmanager
    def running(self, count: int) -> Iterator["Load"]:
        """`count` clients until the block ends."""
        threads = [threading.Thread(target=self._run, args=(seed,)) for seed in range(count)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def wait(self, requests: int) -> None:
        """Until so many more are over."""
        count = len(self.outcomes) + requests
        wait_until(lambda: self.faults or len(self.outcomes) >= count, 600)

    def _run(self, seed: int) -> None:
        chance = random.Random(seed)
        with httpx.Client(base_url=self._url, timeout=120) as client:
            while not self._stop.is_set():
                begin = time.monotonic()
                try:
                    kind, headers = self._ask(client, *chance.choice(self._keys), stream=chance.random() < 0.5)
                except Exception as error:
                    self.faults.append(repr(error))
                    return
                self.outcomes.append(Outcome(kind, int(headers["x-attempt"]), headers["x-replica"], begin, time.monotonic()))

    def _ask(self, client: httpx.Client, prompt: str, seed: int, stream: bool) -> tuple[str, httpx.Headers]:
        body: dict[str, Any] = {
            "model": MODEL,
            "prompt": prompt,
            "max_tokens": TOKENS,
            "temperature": 0.9,
            "seed": seed,
            "ignore_eos": True,
        }
        if not stream:
            whole = client.post("/v1/completions", json=body).raise_for_status()
            self._check(prompt, seed, whole.json()["choices"][0]["text"], cut=False)
            return "whole", whole.headers
        text, error = "", None
        with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
            answer.raise_for_status()
            for event in events(answer.iter_lines()):
                assert error is None, "a stream went on behind its error"
                error = event.get("error")
                text += "" if error else event["choices"][0]["text"]
        if error:
            assert error["message"] == "The replica that generated this answer died: send the request again.", error
        self._check(prompt, seed, text, cut=error is not None)
        return "cut" if error else "streamed", answer.headers

    def _check(self, prompt: str, seed: int, text: str, cut: bool) -> None:
        expected = self._texts[prompt, seed]
        if not (expected.startswith(text) if cut else text == expected):
            self.faults.append(f"{prompt!r}, seed {seed}: {text!r} instead of {expected!r}")

    def report(self, killed: float, back: float) -> str:
        """Counts, and the seconds that whole and streamed answers took, p50 and p95."""
        kinds = Counter(outcome.kind for outcome in self.outcomes)
        retried = sum(outcome.attempt > 1 for outcome in self.outcomes)
        spans = {"before": (0.0, killed), "with one replica": (killed, back), "behind": (back, float("inf"))}
        latencies = []
        for name, (begin, end) in spans.items():
            seconds = [each.end - each.begin for each in self.outcomes if begin <= each.begin < end and each.kind != "cut"]
            points = np.percentile(seconds, (50, 95)) if seconds else (0.0, 0.0)
            latencies.append(f"{name} {points[0]:.2f} / {points[1]:.2f} s ({len(seconds)})")
        return (
            f"{len(self.outcomes)} requests: {dict(kinds)}, {retried} retried; another replica answers after {back - killed:.1f} s; "
            f"p50 / p95 of an answer: {', '.join(latencies)}"
        )
