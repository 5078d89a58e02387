"""Exports killed half-way: no half-written bundle, the old one survives, and the next export cleans up."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusionroute.fr_export.bundle.staged_folder import StagedBundle
from fusionroute.runtime import FusionRuntime, InputError
from fusionroute.runtime.bundle import Bundle
from tests.support.paths import REPOSITORY
from tests.support.systems import Shape, make_system

SHAPE = Shape(heads=2, kv_heads=1, head_dim=16, hidden=32, layers=1, experts=2)

# Imports the exporter and traces the system once, then forks one process per line of stdin. That process runs
# `export.py` with the arguments of the line, without the comparison. With `stop`, it creates the file `reached` and
# waits when it writes its seventh piece of weights.
SERVER = """
import json, os, signal, sys, time
import torch
from rich.console import Console
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.graphs import weight_store as store
from fusionroute.fr_export.graphs.traces import Traces
from fusionroute.fr_export.commands.main import run
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.verify import measure

def stop(reached):
    write, calls = store.Writer.write, []
    def writes(self, array):
        write(self, array)
        calls.append(1)
        if len(calls) == 7:
            open(reached, "w").close()
            time.sleep(10)  # pieces are written by threads, which end what they have begun
    store.Writer.write = writes

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
            os.dup2(os.open(order["err"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        sys.argv = ["export.py", *order["arguments"]]
        if order["stop"]:
            stop(order["stop"])
        run("export")
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Exporter:
    """Runs exports of one system to one place in processes of their own."""

    def __init__(self, server: "subprocess.Popen[str]", flags: list[str], folder: Path):
        self.server, self.flags, self.folder = server, flags, folder
        self.out = folder / "dist" / "bundle"

    def run(self, *flags: str, kill: signal.Signals | None = None) -> tuple[int, str]:
        """Exit status and stderr; with `kill`, the process gets the signal while it writes weights."""
        assert self.server.stdin and self.server.stdout
        reached, err = self.folder / "reached", self.folder / "stderr"
        arguments = [*self.flags, "--out", str(self.out), *flags]
        order = {"arguments": arguments, "stop": str(reached) if kill else None, "err": str(err)}
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        child = int(self.server.stdout.readline())
        if kill:
            wait_for(reached)
            reached.unlink()
            assert any(path.name == f".bundle.partial-{child}" for path in self.out.parent.iterdir())
            os.kill(child, kill)
        return int(self.server.stdout.readline()), err.read_text()

    def present(self) -> list[str]:
        return sorted(path.name for path in self.out.parent.iterdir())


def wait_for(file: Path) -> None:
    end = time.monotonic() + 120
    while not file.exists():
        assert time.monotonic() < end, f"{file} was never made"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def exporter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exporter]:
    folder = tmp_path_factory.mktemp("killed")
    router, experts = make_system(folder, SHAPE)
    flags = ["--family", "llama3", "--precision", "fp32", "--router", router]
    flags += [part for name, path in experts.items() for part in ("--expert", f"{name}={path}")]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, router, json.dumps(experts)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
    )  # fmt: skip
    yield Exporter(server, flags, folder)
    server.kill()
    server.wait()
    for pipe in (server.stdin, server.stdout):
        assert pipe
        pipe.close()


ENDS = {signal.SIGTERM: 143, signal.SIGINT: 1, signal.SIGKILL: -signal.SIGKILL}


def test_killed_exports_and_the_ones_after_them(exporter: Exporter) -> None:
    """First without an old bundle, then over one."""
    for kill in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        status, err = exporter.run(kill=kill)
        assert status == ENDS[kill]
        assert "Traceback" not in err
        if kill == signal.SIGINT:
            assert err.splitlines()[-1] == "error: Interrupted; nothing was written."
        assert not exporter.out.exists()
        assert bool(exporter.present()) == (kill == signal.SIGKILL), "only what cannot be caught leaves something"
    assert exporter.run()[0] == 0
    assert exporter.present() == ["bundle"]
    Bundle.open(exporter.out).verify()

    before = (exporter.out / "manifest.json").read_bytes()
    for kill in (signal.SIGTERM, signal.SIGKILL):
        status, _ = exporter.run("--force", "--fusion", "additive", kill=kill)
        assert status == ENDS[kill]
        assert (exporter.out / "manifest.json").read_bytes() == before
        with FusionRuntime.load(exporter.out, verify=True) as runtime:
            assert len(runtime.generate([1, 5, 9], 2).experts) == 2
        assert (exporter.present() == ["bundle"]) == (kill != signal.SIGKILL)
    assert exporter.run("--force", "--fusion", "additive")[0] == 0
    assert exporter.present() == ["bundle"]
    assert json.loads((exporter.out / "manifest.json").read_text())["fusion"] == "additive"
    Bundle.open(exporter.out).verify()


REPLACE = """
import os, signal, sys
from pathlib import Path
from fusionroute.fr_export.bundle.staged_folder import StagedBundle
from fusionroute.runtime import files

rename, calls = Path.rename, []

def renames(self, target):
    calls.append(1)
    if len(calls) == int(sys.argv[2]) + 1:
        os.kill(os.getpid(), getattr(signal, sys.argv[3]))
    return rename(self, target)

Path.rename = renames
files.exchange = lambda first, second: False  # as where the system has none
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
signal.signal(signal.SIGINT, signal.default_int_handler)
with StagedBundle(Path(sys.argv[1]), True) as staging:
    (staging.folder / "manifest.json").write_text('{"format": 1, "family": "new", "models": [], "files": {}}')
"""


@pytest.mark.parametrize(("name", "done"), [("SIGKILL", 0), ("SIGKILL", 1), ("SIGKILL", 2), ("SIGTERM", 1), ("SIGINT", 1)])
def test_killed_while_a_bundle_is_replaced(tmp_path: Path, name: str, done: int) -> None:
    """After 0, 1 or both renames (both: nothing kills it) the next export sees the old bundle or the new one, whole."""
    out = tmp_path / "bundle"
    out.mkdir()
    (out / "manifest.json").write_text('{"format": 1, "family": "old", "models": [], "files": {}}')
    killed = subprocess.run(
        [sys.executable, "-c", REPLACE, str(out), str(done), name], cwd=REPOSITORY, stderr=subprocess.DEVNULL, timeout=60, check=False
    )
    assert (killed.returncode == 0) == (done == 2)
    caught = name != "SIGKILL" or done == 2
    assert out.exists() == (caught or done == 0)
    with pytest.raises(InputError, match="add --force"), StagedBundle(out, False):
        pass
    assert json.loads((out / "manifest.json").read_text())["family"] == ("new" if done == 2 else "old")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    if not caught:
        with StagedBundle(out, True) as staging:
            (staging.folder / "manifest.json").write_text("new")
        assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_as_a_process(exporter: Exporter, tmp_path: Path) -> None:
    """`python export.py` ended by SIGTERM as soon as it has begun to write."""
    out = tmp_path / "dist" / "bundle"
    process = subprocess.Popen(
        [sys.executable, "export.py", *exporter.flags, "--out", str(out)], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 120
    while not list(tmp_path.glob("dist/.bundle.partial-*/graphs/weights")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in err
    assert not list((tmp_path / "dist").iterdir())


TURNED = """
import os, signal
from pathlib import Path
from fusionroute.runtime.command_errors import one_sentence

with one_sentence("export", "{}", Path("out"), "nothing was written", False):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except SystemExit as end:
        raise ImportError("initialization failed") from end
"""


def test_an_exit_that_a_library_turned_into_its_own_error() -> None:
    """As an extension module does that is being imported when SIGTERM comes."""
    ended = subprocess.run([sys.executable, "-c", TURNED], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (143, "")
