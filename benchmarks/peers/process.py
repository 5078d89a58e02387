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

BENCH = Path(__file__).resolve().parents[1]
SETTLE = 0.05  # seconds between two turns: threads that wait actively give up by then


class PeerError(RuntimeError):
    """A peer that could not do what it was asked."""


def environment() -> dict[str, str]:
    """Variables of all peers: this folder and the project importable, and nothing fetched."""
    return os.environ | {"PYTHONPATH": f"{BENCH}:{BENCH.parent}", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class Worker:
    """One process with one loaded peer."""

    def __init__(self, python: Path, module: str, log: Path, **request: Any):
        self._log = log.open("w")
        command = [python, "-m", f"peers.{module}"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
        self._process = subprocess.Popen(command, env=environment(), text=True, bufsize=1, **pipes)
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
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{answer['error']} (asked to {do}: see {self.path})")
        return answer

    def seconds(self) -> float:
        """Processor time used so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End the process."""
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait()
        self._log.close()


@contextmanager
def working(workers: dict[str, Worker]) -> Iterator[dict[str, Worker]]:
    """Workers that end with the block."""
    try:
        yield workers
    finally:
        for worker in workers.values():
            worker.close()


@dataclass(frozen=True)
class Measured:
    """One worker's rounds. `decode`: seconds of each text's tokens behind the first; `prefill`: to the first token of a long prompt."""

    decode: list[float]
    prefill: list[float]
    tokens: list[list[int]]  # of each text behind `decode`
    experts: list[list[str]]  # that answered them
    peak: int  # bytes
    idle: float  # the most processor time used while others worked, as a share of one core


def in_turns(workers: dict[str, Worker], short: list[list[int]], long: list[list[int]], count: int) -> dict[str, Measured]:
    """Ask every worker once per round, one at a time; the first prompts warm up. `count` tokens are timed behind the first one."""
    texts: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    prefill: dict[str, list[float]] = {name: [] for name in workers}
    idle = dict.fromkeys(workers, 0.0)
    for number, (prompt, lengthy) in enumerate(zip(short, long, strict=True)):
        for name, worker in workers.items():
            time.sleep(SETTLE)
            before, start = {other: workers[other].seconds() for other in workers if other != name}, time.perf_counter()
            text = worker.ask("generate", prompt=prompt, count=count + 1)
            first = worker.ask("generate", prompt=lengthy, count=1)["first"]
            took = time.perf_counter() - start
            idle |= {other: max(idle[other], (workers[other].seconds() - used) / took) for other, used in before.items()}
            if number:
                texts[name].append(text)
                prefill[name].append(first)
    peaks = {name: int(worker.ask("memory")["peak"]) for name, worker in workers.items()}

    def told(name: str, what: str) -> list[Any]:
        return [text[what] for text in texts[name]]

    return {
        name: Measured(told(name, "rest"), prefill[name], told(name, "tokens"), told(name, "experts"), peaks[name], idle[name])
        for name in workers
    }


def times(theirs: list[float], ours: list[float]) -> float:
    """How many times as long they took: the median over the rounds of the two seconds of one round."""
    return median(there / here for there, here in zip(theirs, ours, strict=True))
