"""Exports that are killed: processes which are forked from one that has imported the exporter and traced the system."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.support.paths import REPOSITORY
from tests.support.systems import Shape, make_system

SHAPE = Shape(heads=2, kv_heads=1, head_dim=16, hidden=32, layers=1, experts=2, tokenizer=True)

# Imports the exporter and traces the system once, then forks one process per line of stdin. That process runs `export.py`
# with the arguments of the line, without the comparison. It may be told to die by SIGKILL: `stage` N at the beginning of
# its Nth stage, `kept` N when it has kept N matrices. With `stop`, it creates that file when it writes its seventh piece
# of weights, and waits until somebody removes it.
SERVER = """
import json, os, signal, sys, threading, time
import torch
from rich.console import Console
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.graphs import weight_store as store
from fusionroute.fr_export.graphs.traces import Traces
from fusionroute.fr_export.commands.main import run
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.precision.kept_matrices import KeptModel
from fusionroute.fr_export.verify import measure

def before(owner, name, do):
    calls, method = [], getattr(owner, name)
    def wrapped(self, *arguments):
        calls.append(1)
        do(len(calls))
        return method(self, *arguments)
    setattr(owner, name, wrapped)

def after(owner, name, do):
    # one at a time: of several threads' calls, as many have ended as are counted
    calls, method, lock = [], getattr(owner, name), threading.Lock()
    def wrapped(self, *arguments):
        with lock:
            result = method(self, *arguments)
            calls.append(1)
            do(len(calls))
        return result
    setattr(owner, name, wrapped)

def die_at(number):
    def die(count):
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
    return die

def stop_at(reached):
    def stop(count):
        if count == 7:
            open(reached, "w").close()
            while os.path.exists(reached):  # pieces are written by threads, which end what they have begun
                time.sleep(0.005)
    return stop

signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs, such as some CI runs, inherit it ignored
torch.set_num_threads(1)  # threads would not survive the fork
system = System.open(FAMILIES["llama3"], sys.argv[1], json.loads(sys.argv[2]))
graphs = Traces(system, Stages(Console(quiet=True))).of()
Traces.of, measure.REFERENCE_LIMIT = lambda *_: graphs, 0

for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if not child:
        for stream in (1, 2):
            os.dup2(os.open(order["err"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), stream)
        sys.argv = ["export.py", *order["arguments"]]
        if order.get("stop"):
            before(store.Writer, "write", stop_at(order["stop"]))
        if order.get("stage"):
            before(Stages, "stage", die_at(order["stage"]))
        if order.get("kept"):
            after(KeptModel, "keep", die_at(order["kept"]))
        run("export")
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Exporter:
    """Runs exports of one system to one place in processes of their own. `cache`: their XDG_CACHE_HOME."""

    def __init__(self, server: "subprocess.Popen[str]", flags: list[str], folder: Path):
        self.server, self.flags, self.folder = server, flags, folder
        self.out, self.cache = folder / "dist" / "bundle", folder / "cache"

    def run(self, *flags: str, kill: signal.Signals | None = None, after: float | None = None, **die: int) -> tuple[int, str]:
        """Exit status and stderr. With `kill`, the process gets the signal while it writes weights; SIGKILL `after` so many
        seconds; `stage` or `kept`: see SERVER.
        """
        reached, err = self.folder / "reached", self.folder / "stderr"
        arguments = [*self.flags, "--out", str(self.out), *flags]
        child = self._start({"arguments": arguments, "err": str(err), "stop": str(reached) if kill else None, **die})
        if kill:
            wait_for(reached)
            assert any(path.name == f".bundle.partial-{child}" for path in self.out.parent.iterdir())
            os.kill(child, kill)
            reached.unlink()
        if after is not None:
            time.sleep(after)
            with suppress(ProcessLookupError):  # it has ended
                os.kill(child, signal.SIGKILL)
        return int(self._line()), err.read_text()

    def _start(self, order: dict[str, Any]) -> int:
        assert self.server.stdin
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        return int(self._line())

    def _line(self) -> str:
        assert self.server.stdout
        return self.server.stdout.readline()

    def present(self) -> list[str]:
        """What lies where the bundle does."""
        return sorted(path.name for path in self.out.parent.iterdir()) if self.out.parent.exists() else []


def wait_for(file: Path) -> None:
    """Until it is there."""
    end = time.monotonic() + 120
    while not file.exists():
        assert time.monotonic() < end, f"{file} was never made"
        time.sleep(0.02)


@contextmanager
def exporting(folder: Path, precisions: str) -> Iterator[Exporter]:
    """A small system in a folder, and what exports it in some precisions, calibrated with three prompts."""
    router, experts = make_system(folder, SHAPE)
    (folder / "prompts.txt").write_text("one two\nthree four\nfive six\n")
    flags = ["--family", "llama3", "--precision", precisions, "--calibration", str(folder / "prompts.txt"), "--max-seq-len", "64"]
    flags += ["--router", router, *(part for name, path in experts.items() for part in ("--expert", f"{name}={path}"))]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "XDG_CACHE_HOME": str(folder / "cache")}
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, router, json.dumps(experts)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
    )  # fmt: skip
    try:
        yield Exporter(server, flags, folder)
    finally:
        server.kill()
        server.wait()
        for pipe in (server.stdin, server.stdout):
            assert pipe
            pipe.close()
