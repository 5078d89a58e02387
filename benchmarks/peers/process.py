"""Peers as processes: asking them, and asking them in turns."""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
SETTLE = 0.05  # seconds between two turns, in which spinning threads go to sleep


class PeerError(RuntimeError):
    """A peer could not do what it was asked."""


def environment() -> dict[str, str]:
    """Environment variables of all peers: the checkout can be imported, and nothing is fetched."""
    return os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class Worker:
    """One process with one loaded peer."""

    def __init__(self, python: Path, module: str, log: Path, **request: Any):
        self._log = log.open("w")
        command: list[str | Path] = [python, "-m", f"benchmarks.peers.{module}"]
        self._process = subprocess.Popen(
            command, env=environment(), text=True, bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log
        )
        self.path = log
        try:
            self.ask("load", **request)
        except PeerError:
            self.close()
            raise

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer. Raises PeerError."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin and stdout
        try:
            stdin.write(json.dumps({"do": do, **request}) + "\n")
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerError(f"the process ended while it was asked to {do}: see {self.path}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{answer['error']} (asked to {do}: see {self.path})")
        return answer

    def seconds(self) -> float:
        """Processor time used so far, user and system."""
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    def close(self) -> None:
        """End the process."""
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait()
        self._log.close()


@contextmanager
def working(workers: dict[str, Worker]) -> Iterator[dict[str, Worker]]:
    """Workers that end with the `with` block."""
    try:
        yield workers
    finally:
        for worker in workers.values():
            worker.close()


@dataclass(frozen=True)
class Measured:
    """One worker's rounds.

    `decode`: seconds for all tokens of a text after the first; `prefill`: seconds to the first token of a long prompt.
    """

    decode: list[float]
    prefill: list[float]
    tokens: list[list[int]]  # of each text that `decode` timed
    experts: list[list[str]]  # the expert of each token
    peak: int  # bytes
    idle: float  # most processor time used while another worker ran, as a share of one core


def in_turns(workers: dict[str, Worker], short: list[list[int]], long: list[list[int]], count: int) -> dict[str, Measured]:
    """Ask every worker once per round, one at a time; the first round only warms up.

    `count` tokens are timed after the first one of each text.
    """
    texts: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    prefill: dict[str, list[float]] = {name: [] for name in workers}
    idle = dict.fromkeys(workers, 0.0)
    for number, (prompt, long_prompt) in enumerate(zip(short, long, strict=True)):
        for name, worker in workers.items():
            time.sleep(SETTLE)
            before, start = {other: workers[other].seconds() for other in workers if other != name}, time.perf_counter()
            text = worker.ask("generate", prompt=prompt, count=count + 1)
            first = worker.ask("generate", prompt=long_prompt, count=1)["first"]
            took = time.perf_counter() - start
            idle |= {other: max(idle[other], (workers[other].seconds() - used) / took) for other, used in before.items()}
            if number > 0:
                texts[name].append(text)
                prefill[name].append(first)
    peaks = {name: int(worker.ask("memory")["peak"]) for name, worker in workers.items()}

    def column(name: str, field: str) -> list[Any]:
        return [text[field] for text in texts[name]]

    return {
        name: Measured(column(name, "rest"), prefill[name], column(name, "tokens"), column(name, "experts"), peaks[name], idle[name])
        for name in workers
    }


def slowdown(theirs: list[float], ours: list[float]) -> float:
    """How many times as long they took: the ratio of each round, median over the rounds."""
    return median(their / our for their, our in zip(theirs, ours, strict=True))
