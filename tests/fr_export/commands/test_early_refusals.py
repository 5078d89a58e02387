"""What can be known at once is refused at once: before torch is loaded, and before anything is traced."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from fusionroute.calibration.observers import Observer
from fusionroute.calibration.table import Table
from fusionroute.fr_export.commands.main import run
from fusionroute.runtime import InputError
from tests.fr_export.commands.test_export import assert_one_sentence
from tests.support.commands import Command, in_folder
from tests.support.paths import REPOSITORY
from tests.support.staging import fill

HOLD = """
import sys, time
from pathlib import Path
from fusionroute.fr_export.bundle.staged_folder import StagedBundle
with StagedBundle(Path(sys.argv[1]), True):
    print("held", flush=True)
    time.sleep(600)
"""
TINY = ("--family", "llama3")
CONFIGS = {"llama3": "llama", "gemma2": "gemma2"}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Command]:
    """`export.py` where the exporter cannot be loaded: whatever ends otherwise was refused before."""
    monkeypatch.setitem(sys.modules, "fusionroute.fr_export.export", None)
    with in_folder("export.py", lambda: run("export"), tmp_path, monkeypatch, capsys) as command:
        yield command


def old_bundle(out: Path) -> None:
    fill(out, "old")


def other_files(out: Path) -> None:
    out.mkdir()
    (out / "notes.txt").write_text("mine")


def broken_table(out: Path) -> None:
    (out.parent / "table.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{not a header}")


def table_of_others(out: Path) -> None:
    Table([], {"router": {}, "physics": {}}, "identity").save(out.parent / "table.safetensors")


def table_of_an_older_version(out: Path) -> None:
    models: dict[str, dict[str, Observer]] = {name: {} for name in ("router", "math", "code", "instruction")}
    Table([], models, "identity").save(out.parent / "table.safetensors")


def no_line(out: Path) -> None:
    (out.parent / "prompts.jsonl").write_text('"a prompt"\n{"answer": 3}\n')


def nothing(out: Path) -> None:
    """The folder is empty."""


REFUSED: dict[str, tuple[Callable[[Path], None], tuple[object, ...], tuple[str, ...]]] = {
    "a bundle": (old_bundle, (), ("A bundle exists at ", "--force")),
    "other files, even with --force": (other_files, ("--force",), ("is no bundle", "--out")),
    "a dry run to an old bundle": (old_bundle, ("--dry-run",), ("A bundle exists at ", "--force")),
    "prompts that are missing": (nothing, ("--calibration", "prompts.txt"), ("prompts.txt cannot be read",)),
    "a line without a prompt": (no_line, ("--calibration", "prompts.jsonl"), ("Line 2 of prompts.jsonl holds no prompt",)),
    "a table that is missing": (nothing, ("--calibration", "table.safetensors"), ("table.safetensors",)),
    "a broken table": (broken_table, ("--calibration", "table.safetensors"), ("table.safetensors",)),
    "a table of other experts": (
        table_of_others,
        ("--calibration", "table.safetensors"),
        ("of the models router, physics", "the system has router, math, code, instruction", "calibrate this system"),
    ),
    "a table without keys and values": (
        table_of_an_older_version,
        ("--calibration", "table.safetensors", "--kv", "int8"),
        ("table.safetensors is of a version that did not look at keys and values", "calibrate again, or leave out --kv int8"),
    ),
    "a GPU that no engine is built for": (nothing, ("--target", "rtx:sm10"), ("does not build for sm10", "sm86")),
    "a log in the bundle": (nothing, ("--log", "bundle/log"), ("would lie in the folder", "--log")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_torch_is_loaded(command: Command, tmp_path: Path, name: str) -> None:
    make, flags, words = REFUSED[name]
    make(tmp_path / "bundle")
    before = sorted(tmp_path.rglob("*"))
    ended = command(*TINY, "--out", "bundle", *flags)
    assert ended.status == 1 and ended.out == ""
    assert_one_sentence(ended.err, *words)
    assert sorted(tmp_path.rglob("*")) == before


USAGE: dict[str, tuple[tuple[object, ...], tuple[str, ...]]] = {
    "neither family nor router": ((), ("--family", "--router", "config.json names it")),
    "a precision that needs calibration": (
        (*TINY, "--precision", "w8a8", "--calibration", "none"),
        ("--calibration", "w8a8 for ort:cpu needs the scales of calibration"),
    ),
    "a default that needs it": (
        (*TINY, "--target", "tensorrt", "--calibration", "none"),
        ("--calibration", "int8 for tensorrt needs the scales of calibration", "name other precisions"),
    ),
    "a strict export that compares nothing": ((*TINY, "--strict", "--compare", "none"), ("--strict", "cannot be held to its bound")),
    "no number of tokens": ((*TINY, "--compare", "much"), ("--compare", "'much' is neither 'none' nor a number of tokens")),
    "too few tokens": ((*TINY, "--compare", "1"), ("--compare", "'1' is neither")),
    "one base for a target without pairs": (
        (*TINY, "--shared-base", "--target", "ort,portable"),
        ("--shared-base / --target", "router and experts share no graph for portable; leave it out"),
    ),
    "auto without a base": ((*TINY, "auto"), ("--shared-base auto", "auto says what --shared-base does")),
    "a base of another kind": ((*TINY, "--shared-base", "some"), ("'some'", "'auto'")),
    "a rank of whole models": ((*TINY, "--rank", "4"), ("--rank / --delta-bits", "factors are of models that share one base")),
    "a rank and bits": ((*TINY, "--shared-base", "auto", "--rank", "4", "--delta-bits", "1"), ("both name the size of the factors",)),
    "no bits": ((*TINY, "--shared-base", "--delta-bits", "0"), ("--delta-bits", "0.0 is not a number of bits above 0")),
}


@pytest.mark.parametrize("name", USAGE)
def test_flags_that_do_not_go_together_have_status_2(command: Command, tmp_path: Path, name: str) -> None:
    arguments, words = USAGE[name]
    ended = command(*arguments)
    assert ended.status == 2 and ended.out == ""
    shown = " ".join(ended.err.replace("│", " ").split())
    for word in words:
        assert word in shown
    assert not list(tmp_path.iterdir())


def test_int8_for_a_cpu_does_without_calibration(command: Command) -> None:
    ended = command(*TINY, "--target", "ort,portable", "--precision", "int8", "--calibration", "none")
    assert ended.status == 1 and "The exporter needs the package" in ended.err, "refused by nothing before the exporter is loaded"


def test_a_second_export_names_the_process_of_the_first(command: Command, tmp_path: Path) -> None:
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "bundle")], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    try:
        assert first.stdout.readline() == "held\n"
        ended = command(*TINY, "--out", "bundle", "--force")
        assert ended.status == 1
        assert_one_sentence(ended.err, f"Process {first.pid} is writing to {tmp_path / 'bundle'} already", "--out")
    finally:
        first.kill()
        first.wait()
        first.stdout.close()


def test_a_missing_library_for_engines_is_named(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    ended = command(*TINY, "--target", "rtx")
    assert ended.status == 1
    assert_one_sentence(ended.err, "TensorRT-RTX is not installed", "fusionroute[rtx]")


@pytest.mark.parametrize("family", CONFIGS)
def test_the_family_is_the_one_that_the_routers_config_names(command: Command, tmp_path: Path, family: str) -> None:
    """It chooses the default folder, which is taken here."""
    (tmp_path / "router").mkdir()
    (tmp_path / "router" / "config.json").write_text(f'{{"model_type": "{CONFIGS[family]}"}}')
    (tmp_path / "dist").mkdir()
    fill(tmp_path / "dist" / family, "old")
    ended = command("--router", "router", "--expert", "math=nowhere")
    assert_one_sentence(ended.err, f"A bundle exists at {tmp_path / 'dist' / family}", "--force")


def test_a_router_of_an_unknown_family_is_refused_by_its_config(command: Command, tmp_path: Path) -> None:
    (tmp_path / "router").mkdir()
    assert_one_sentence(command("--router", "router", "--expert", "a=b").err, "router is not a Hugging Face model folder", "config.json")
    (tmp_path / "router" / "config.json").write_text('{"model_type": "mamba"}')
    assert_one_sentence(command("--router", "router", "--expert", "a=b").err, "of model type 'mamba'", "supported families are gemma2")


def test_help_and_refusals_load_no_heavy_package(tmp_path: Path) -> None:
    """As processes: of torch and its like, none is imported."""
    heavy = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime")
    fill(tmp_path / "bundle", "old")
    for arguments, status in ((("--help",), 0), (("--version",), 0), ((*TINY, "--out", str(tmp_path / "bundle")), 1)):
        block = (
            f"import sys; sys.modules.update(dict.fromkeys({heavy})); from fusionroute.fr_export.commands.main import run; run('export')"
        )
        ended = subprocess.run(
            [sys.executable, "-c", block, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "80"}
        )  # fmt: skip
        assert ended.returncode == status and "package" not in ended.stderr, ended.stderr
        assert "<bool>" not in ended.stdout


def test_a_table_of_the_same_models_is_not_refused_yet(command: Command, tmp_path: Path) -> None:
    """A table of this system's models is taken: its matrices are compared with the traces later."""
    names = ("router", "math", "code", "instruction")
    Table([], {name: {} for name in names}, "identity").save(tmp_path / "table.safetensors")
    assert "The exporter needs the package" in command(*TINY, "--calibration", "table.safetensors").err


def test_scales_are_asked_for_before_any_work_from_python_too(tmp_path: Path) -> None:
    from fusionroute.fr_export.console.progress import Stages
    from fusionroute.fr_export.export import Request, check

    request = Request(None, "nowhere", {"one": "nowhere"}, ("fp16", "int8"), ("tensorrt",), tmp_path / "bundle", calibration="none")
    with pytest.raises(InputError) as caught:
        check(request, Stages(Console(quiet=True)))
    assert str(caught.value) == (
        "int8 for tensorrt needs the scales of calibration: leave out calibration='none', or name other precisions."
    )


@pytest.mark.parametrize(("gpus", "precision", "oldest", "least"), [("sm86+sm120", "int8,fp8", 86, 89), ("sm89", "nvfp4", 89, 100)])
def test_engines_for_gpus_without_the_types_are_refused(command: Command, gpus: str, precision: str, oldest: int, least: int) -> None:
    ended = command(*TINY, "--target", f"rtx:{gpus}", "--precision", precision)
    assert ended.status == 1
    name = precision.rpartition(",")[2]
    assert_one_sentence(ended.err, f"GPUs of sm{oldest} have no {name}, which begins with sm{least}: build engines for others")
