"""The command line of the exporter: its output, its exit status, and that failures leave nothing behind."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fusionroute.fr_export import export
from fusionroute.fr_export.commands.main import run
from fusionroute.fr_export.graphs import weight_store
from fusionroute.fr_export.graphs.traces import Traces
from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.bundle import Bundle
from tests.support.commands import Command, in_folder
from tests.support.paths import REPOSITORY
from tests.support.systems import Shape, make_system

SHAPE = Shape(heads=2, kv_heads=1, head_dim=16, hidden=32, layers=1, experts=2, tokenizer=True)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Command]:
    """In an empty folder, with the system's checkpoints beside it."""
    (tmp_path / "here").mkdir()
    with in_folder("export.py", lambda: run("export"), tmp_path / "here", monkeypatch, capsys) as command:
        yield command


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """The flags that name a small system."""
    router, experts = make_system(tmp_path_factory.mktemp("system"), SHAPE)
    return ("--family", "llama3", "--router", router, *(part for name, path in experts.items() for part in ("--expert", f"{name}={path}")))


def assert_one_sentence(err: str, *words: str) -> None:
    """The last line is the error; there is no traceback above it."""
    *above, last = err.splitlines()
    assert last.startswith("error: ") and last.endswith("."), err
    assert "Traceback" not in err and not any("error" in line for line in above), err
    for word in words:
        assert word in last, last


LLAMA = ("--family", "llama3")
USAGE: dict[str, tuple[tuple[object, ...], tuple[str, ...]]] = {
    "no family": ((), ("--family",)),
    "unknown family": (("--family", "mamba"), ("--family", "'mamba'", "gemma2", "llama3")),
    "unknown flag": ((*LLAMA, "--colour", "red"), ("--colour",)),
    "unknown preset": ((*LLAMA, "--preset", "huge"), ("--preset", "'huge'", "tiny", "paper")),
    "unknown target": ((*LLAMA, "--target", "ort,tpu"), ("--target", "'tpu'", "ort")),
    "GPUs that are none": ((*LLAMA, "--target", "rtx:sm86,sm89"), ("--target", "'sm89'", "rtx[:sm86+sm89+sm120]")),
    "a GPU without a number": ((*LLAMA, "--target", "rtx:ampere"), ("--target", "'ampere' is no compute capability", "sm86+sm89+sm120")),
    "unknown target of a preset without router": ((*LLAMA, "--preset", "paper", "--target", "nonsense"), ("--target", "'nonsense'")),
    "GPUs that are none of such a preset": ((*LLAMA, "--preset", "paper", "--target", "rtx:ampere"), ("--target", "'ampere'")),
    "unknown precision of such a preset": ((*LLAMA, "--preset", "paper", "--precision", "int3"), ("--precision", "'int3'")),
    "unknown precision": ((*LLAMA, "--precision", "fp32,int3"), ("--precision", "'int3'", "fp32, fp16, bf16, int8, int4")),
    "no precision": ((*LLAMA, "--precision", ""), ("--precision", "fp32, fp16, bf16, int8, int4")),
    "unknown precision of keys and values": ((*LLAMA, "--kv", "int2"), ("--kv", "'int2'", "fp32", "int8", "int4")),
    "keys and values in fp16 on a CPU": (
        (*LLAMA, "--kv", "fp16"),
        ("--kv / --target", "ort:cpu keeps no keys and values in fp16; name one of fp32, int8, int4"),
    ),
    "keys and values in fp8 on a CPU": (
        (*LLAMA, "--kv", "fp8"),
        ("--kv / --target", "ort:cpu keeps no keys and values in fp8; name one of fp32, int8, int4"),
    ),
    "keys and values of another target": (
        (*LLAMA, "--target", "ort,portable", "--kv", "int8"),
        ("portable keeps keys and values in the type of its activations; leave out --kv, or export portable without it",),
    ),
    "keys and values of engines": (
        (*LLAMA, "--target", "rtx", "--kv", "int8"),
        ("tensorrt keeps keys and values in the type of its activations; leave out --kv, or export tensorrt without it",),
    ),
    "keys and values without scales": (
        (*LLAMA, "--calibration", "none", "--kv", "int8"),
        ("--kv / --calibration", "int8 needs the scales of calibration; leave out --calibration none, or name fp32"),
    ),
    "unknown fusion": ((*LLAMA, "--fusion", "product"), ("--fusion", "'product'", "weighted", "additive")),
    "large lambda": ((*LLAMA, "--lambda", "1.5"), ("--lambda",)),
    "lambda that is none": ((*LLAMA, "--lambda", "nan"), ("--lambda",)),
    "context of one": ((*LLAMA, "--max-seq-len", "1"), ("--max-seq-len", "2")),
    "word for a context": ((*LLAMA, "--max-seq-len", "long"), ("--max-seq-len", "integer")),
    "expert without source": ((*LLAMA, "--router", "r", "--expert", "math"), ("'math' is not NAME=SRC", "--expert math=checkpoints/math")),
    "expert with empty source": ((*LLAMA, "--router", "r", "--expert", "math="), ("'math=' is not NAME=SRC",)),
    "expert without name": ((*LLAMA, "--router", "r", "--expert", "=x"), ("'=x' is not NAME=SRC",)),
    "name that is a path": (
        (*LLAMA, "--router", "r", "--expert", "../a=x"),
        ("the name '../a' is not made of letters, digits and '_' alone, a letter or '_' first; expected NAME=SRC",),
    ),
    "name with a dash": (
        (*LLAMA, "--router", "r", "--expert", "my-math=x"),
        ("the name 'my-math' is not made of letters, digits and '_' alone",),
    ),
    "no name": ((*LLAMA, "--router", "r", "--expert", "models/math"), ("'models/math' is not NAME=SRC, such as --expert math=",)),
    "expert named router": (
        (*LLAMA, "--router", "r", "--expert", "router=x"),
        ("'router' is what the bundle calls another of its graphs; give the expert another name",),
    ),
    "two of a name": ((*LLAMA, "--router", "r", "--expert", "a=x", "--expert", "a=y"), ("--expert", "a name of its own")),
    "router alone": ((*LLAMA, "--router", "r"), ("--router and --expert go together",)),
    "experts alone": ((*LLAMA, "--expert", "a=x"), ("--router and --expert go together",)),
}


@pytest.mark.parametrize("name", USAGE)
def test_wrong_usage_has_status_2(command: Command, name: str) -> None:
    arguments, words = USAGE[name]
    ended = command(*arguments)
    assert ended.status == 2 and ended.out == ""
    shown = " ".join(ended.err.replace("│", " ").split())
    assert "Traceback" not in shown
    for word in words:
        assert word in shown
    assert not list(Path().iterdir())


FAILURES: dict[str, tuple[tuple[object, ...], tuple[str, ...]]] = {
    "paper without router": ((*LLAMA, "--preset", "paper"), ("No router is published", "'paper' of llama3", "--router")),
    "missing router": ((*LLAMA, "--router", "nowhere", "--expert", "a=no"), ("checkpoint folder nowhere does not exist",)),
    "hub offline": ((*LLAMA, "--router", "owner/name", "--expert", "a=no"), ("owner/name", "hub cannot be reached", "local folder")),
    "wrong family": (("SYSTEM", "--family", "gemma2"), ("The router", "'llama'", "use --family llama3")),
    "two experts too few": ((*LLAMA, "--router", "ROUTER", "--expert", "a=ROUTER"), ("shape [2, 32]", "1 expert(s) (a)", "[1, 32]")),
    "long context": (("SYSTEM", "--max-seq-len", "1025"), ("--max-seq-len 1025", "2 to 1024")),
    "other key of the head": (("SYSTEM", "--routing-head-key", "gate"), ("'gate.weight'", "--routing-head-key")),
    "prompts that are missing": (("SYSTEM", "--calibration", "prompts.txt"), ("prompts.txt cannot be read", "UTF-8")),
    "prompts of another kind": (("SYSTEM", "--calibration", "prompts.csv"), ("prompts.csv", "'builtin'", ".txt or .jsonl")),
    "place below a file": (("SYSTEM", "--out", "ROUTER/config.json/out"), ("Cannot write to", "--out")),
    "place of other files": (("SYSTEM", "--out", "ROUTER", "--force"), ("is no bundle", "--out")),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_end_in_one_sentence_and_leave_nothing(
    command: Command, system: tuple[object, ...], name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    arguments, words = FAILURES[name]
    router = Path(str(system[3]))
    before = sorted(router.rglob("*"))
    given: list[object] = []
    for argument in arguments:
        given += system if argument == "SYSTEM" else [str(argument).replace("ROUTER", str(router))]
    for flags in ((), ("--json",)):
        ended = command(*given, *flags)
        assert ended.status == 1 and ended.out == ""
        assert_one_sentence(ended.err, *words)
    assert not [path for path in Path().rglob("*") if path.name != "dist"]
    assert sorted(router.rglob("*")) == before


def python(*arguments: object, folder: Path = REPOSITORY) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, timeout=300, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def done(system: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> "tuple[subprocess.CompletedProcess[str], Path]":
    """One whole run of `python export.py --json`, and the bundle it wrote to the default place."""
    folder = tmp_path_factory.mktemp("exported")
    run = python(REPOSITORY / "export.py", *system, "--json", "--precision", "fp32", folder=folder)
    return run, folder / "dist" / "llama3"


@pytest.fixture
def exported(done: "tuple[subprocess.CompletedProcess[str], Path]") -> Path:
    """A bundle of the system."""
    return done[1]


def test_json_is_all_of_stdout_and_no_library_speaks(done: "tuple[subprocess.CompletedProcess[str], Path]") -> None:
    run, bundle = done
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report["family"] == "llama3" and [variant["precision"] for variant in report["variants"]] == ["fp32"]
    assert report["variants"][0]["compared"]["decode"]["greedy_agreement"] > 0.9
    stages = [stage["name"] for stage in report["stages"]]
    assert all(any(line.startswith(stage) for stage in stages) for line in run.stderr.splitlines() if line.strip()), run.stderr
    assert json.loads((bundle / "report.json").read_text()) == report
    assert [path.name for path in bundle.parent.iterdir()] == ["llama3"]
    Bundle.open(bundle).verify()


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    command: Command, system: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raising(AssertionError("nothing may be traced"))(monkeypatch)
    ended = command(*system, "--precision", "fp32,int4", "--dry-run", "--json")
    assert ended.status == 0, ended.err
    forecast = json.loads(ended.out)
    assert forecast["family"] == "llama3" and forecast["max_seq_len"] == 1024
    assert [source["model"] for source in forecast["sources"]] == ["router", "expert0", "expert1"]
    files = [*Path(str(system[3])).glob("*.safetensors")]
    assert forecast["sources"][0]["bytes"] == sum(file.stat().st_size for file in files) and forecast["sources"][0]["dtypes"] == ["F32"]
    assert [(variant["precision"], variant["bits_per_weight"]) for variant in forecast["variants"]] == [("fp32", 32.0), ("int4", 5.0)]
    written = sum(variant["bytes"] for variant in forecast["variants"])
    assert written <= forecast["disk_needed"] <= 1.2 * written
    assert 0 < forecast["seconds"][0] < forecast["seconds"][1] and 2e8 < forecast["peak_memory"][0] < forecast["peak_memory"][1]
    assert {"recording", "writing int4 for ort:cpu", "comparing fp32 for ort:cpu"} <= {stage["name"] for stage in forecast["stages"]}
    monkeypatch.setenv("COLUMNS", "80")
    shown = command(*system, "--precision", "fp32,int4", "--dry-run", "--compare", "none").out
    assert max(map(len, shown.splitlines())) <= 80 and "…" not in shown
    for word in ("To be written", "Disk: ", "Memory: ", "Time: ", "Nothing is compared with torch.", "Nothing was written."):
        assert word in " ".join(shown.split())
    assert not list(Path().iterdir())


def test_compare_none_and_a_log(command: Command, system: tuple[object, ...], tmp_path: Path) -> None:
    flags = ("--precision", "int8", "--calibration", "none", "--out", tmp_path / "bundle", "--log", tmp_path / "export.log", "--json")
    ended = command(*system[2:], *flags, "--compare", "none")
    assert ended.status == 0, ended.err
    report = json.loads(ended.out)
    assert report["family"] == "llama3", "the config names it"
    assert report["not_compared"] == "--compare none" and report["variants"][0]["compared"] is None
    text = (tmp_path / "export.log").read_text()
    for stage in report["stages"]:
        assert f"{stage['name']}: {stage['seconds']:.2f} s" in text
    assert text.rstrip().endswith("done") and "torch 2." in text and not any("comparing" in stage["name"] for stage in report["stages"])
    Bundle.open(tmp_path / "bundle").verify()


def test_a_failure_is_in_the_log(command: Command, system: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(RuntimeError("two words"))(monkeypatch)
    assert command(*system, "--log", tmp_path / "export.log").status == 1
    text = (tmp_path / "export.log").read_text()
    assert "Traceback" in text and "RuntimeError: two words" in text and "checking the checkpoints: " in text


def test_a_bundle_that_exists_is_kept_without_force(command: Command, system: tuple[object, ...], exported: Path) -> None:
    before = (exported / "manifest.json").stat().st_mtime_ns
    ended = command(*system, "--out", exported)
    assert ended.status == 1
    assert_one_sentence(ended.err, f"A bundle exists at {exported}", "--force", "--out")
    assert (exported / "manifest.json").stat().st_mtime_ns == before


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))


def disk_that_fills(monkeypatch: pytest.MonkeyPatch) -> None:
    write, calls = weight_store.Writer.write, 0

    def fails(self: weight_store.Writer, array: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, array)

    monkeypatch.setattr(weight_store.Writer, "write", fails)


def raising(error: BaseException) -> Callable[[pytest.MonkeyPatch], None]:
    def fails(*_: object, **__: object) -> None:
        raise error

    return lambda monkeypatch: monkeypatch.setattr(Traces, "of", fails)


TROUBLES: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], tuple[str, ...]]] = {
    "full disk": (full_disk, ("The bundle needs about", " free: make room, export fewer precisions, or name another disk with --out")),
    "disk that fills": (disk_that_fills, ("No space left on device", "make room, or name another disk with --out", "nothing was written")),
    "disk that breaks": (raising(OSError(errno.EIO, "Input/output error", "weights.bin")), ("weights.bin (Input/output error)",)),
    "fault": (raising(RuntimeError("one\n\n two.")), ("unexpectedly (RuntimeError: one two.)", "nothing was written", "--debug")),
    "fault without words": (raising(AssertionError()), ("unexpectedly (AssertionError: AssertionError)", "--debug")),
    "out of memory": (raising(MemoryError()), ("unexpectedly (MemoryError", "nothing was written")),
    "interrupt": (raising(KeyboardInterrupt()), ("Interrupted; nothing was written",)),
    "missing package": (raising(ModuleNotFoundError("No module", name="onnxscript")), ("package 'onnxscript'", "fusionroute[export,cpu]")),
}


@pytest.mark.parametrize("name", TROUBLES)
def test_troubles_leave_the_old_bundle(
    command: Command, system: tuple[object, ...], exported: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trouble, words = TROUBLES[name]
    trouble(monkeypatch)
    ended = command(*system, "--out", exported, "--force")
    assert ended.status == 1 and ended.out == ""
    assert_one_sentence(ended.err, *words)
    assert [path.name for path in exported.parent.iterdir()] == [exported.name]
    with FusionRuntime.load(exported, verify=True) as runtime:
        assert runtime.generate("12+30=", 2).experts


def test_debug_shows_where(command: Command, system: tuple[object, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    raising(RuntimeError("two words"))(monkeypatch)
    ended = command(*system, "--debug")
    assert ended.status == 1
    assert "Traceback" in ended.err and ended.err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("package", ["torch", "onnx_ir"])
def test_without_a_package_that_the_exporter_needs(package: str, tmp_path: Path) -> None:
    lacking = f"import sys; sys.modules['{package}'] = None; from fusionroute.fr_export.commands.main import run; run('export')"
    ended = python("-c", lacking, *LLAMA, "--out", tmp_path / "bundle")
    assert ended.returncode == 1 and ended.stdout == ""
    assert ended.stderr.splitlines()[-1] == (
        f"error: The exporter needs the package '{package}': install the extra 'export' (pip install 'fusionroute[export,cpu]')."
    )


def test_wrong_usage_as_a_process() -> None:
    wrong = python("export.py", *LLAMA, "--precision", "int3")
    assert wrong.returncode == 2 and wrong.stdout == "" and "Traceback" not in wrong.stderr and "'int3'" in wrong.stderr


@pytest.mark.parametrize("flags", [("--target", "nonsense"), ("--target", "rtx:ampere"), ("--precision", "int3")], ids=" ".join)
def test_wrong_flags_are_refused_before_the_exporter_is_loaded(
    command: Command, flags: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fusionroute.fr_export.export", None)
    assert command(*LLAMA, *flags).status == 2
    assert command(*LLAMA).status == 1, "the exporter is loaded after the flags"


def test_a_reader_that_has_left(system: tuple[object, ...], command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the reader of stdout has left, there is no traceback, and the bundle stays."""

    class Closed:
        """A stdout whose other end is closed."""

        def write(self, text: str) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        def flush(self) -> None:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(export, "export", lambda request, stages: {"family": "llama3"})
    monkeypatch.setattr(sys, "stdout", Closed())
    ended = command(*system, "--json")
    assert ended.status == 1 and "error" not in ended.err and "Traceback" not in ended.err
