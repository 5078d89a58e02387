"""`fusionroute`: every verb of the table, by all the names that it has."""

import subprocess
import sys
from importlib import import_module
from inspect import signature
from pathlib import Path

import onnx
import pytest

from fusionroute.fr_export.commands.main import VERBS, run
from fusionroute.runtime.manifest import Manifest
from tests.support.paths import REPOSITORY
from tests.support.systems import Shape, make_system

HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "sacrebleu", "matplotlib")


def python(*arguments: object) -> "subprocess.CompletedProcess[str]":
    """A process in the checkout."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_a_function_that_takes_debug(name: str) -> None:
    module, function = VERBS[name].function.split(":")
    assert "debug" in signature(getattr(import_module(module), function)).parameters
    assert VERBS[name].help.endswith(".")


@pytest.mark.parametrize("name", [None, *VERBS])
def test_help_needs_no_heavy_package(name: str | None) -> None:
    """Of the list of verbs, and of each verb: none is imported, so that none need be installed."""
    block = f"import sys; sys.modules.update(dict.fromkeys({HEAVY})); from fusionroute.fr_export.commands.main import main; main()"
    ended = python("-c", block, *([name] if name else []), "--help")
    assert ended.returncode == 0 and ended.stderr == ""
    assert "--debug" in ended.stdout and f"Usage: fusionroute {name or '[OPTIONS] COMMAND'}" in ended.stdout


@pytest.mark.parametrize(
    ("door", "name"),
    [
        (("export.py",), "export"),
        (("-m", "fr_export.training"), "train"),
        (("-m", "fr_export.evaluate"), "evaluate"),
        (("-m", "calibration"), "calibrate"),
        *((("-m", "runtime", name), name) for name in ("generate", "bench", "inspect", "build")),
    ],
)
def test_a_checkout_has_each_verb_by_another_name(door: tuple[str, ...], name: str) -> None:
    def options(*command: str) -> list[str]:
        return python(*command, "--help").stdout.partition("Options")[2].splitlines()

    assert options(*door) == options("-m", "fusionroute", name) != []


LACKING = {
    "export": (("--family", "llama3"), "torch", "fusionroute[export,cpu]"),
    "train": (("--family", "llama3", "--router", "r", "--out", "o", "--direct", "--sft", "s"), "torch", "fusionroute[export,train]"),
    "evaluate": (("bundle",), "sacrebleu", "fusionroute[train]"),
}


@pytest.mark.parametrize("name", LACKING)
def test_a_verb_without_its_packages_says_what_to_install(name: str, tmp_path: Path) -> None:
    arguments, package, install = LACKING[name]
    block = f"import sys; sys.modules['{package}'] = None; from fusionroute.fr_export.commands.main import main; main()"
    ended = python("-c", block, name, *arguments)
    assert ended.returncode == 1 and ended.stdout == ""
    sentence = ended.stderr.splitlines()[-1]
    assert sentence.startswith("error: ") and f"'{package}'" in sentence and install in sentence


@pytest.mark.slow
def test_inspect_counts_the_bytes_that_the_caches_of_the_graphs_have(tmp_path: Path) -> None:
    router, experts = make_system(tmp_path, Shape(heads=2, kv_heads=1, head_dim=16, hidden=32, layers=1, experts=2))
    system = ("--family", "llama3", "--router", router, *(part for name in experts for part in ("--expert", f"{name}={experts[name]}")))
    targets, precisions = "ort,ort:cuda,portable,tensorrt", "fp32,fp16,int4,int8-wo"
    out = ("--target", targets, "--precision", precisions, "--calibration", "none", "--out", str(tmp_path / "bundle"))
    with pytest.raises(SystemExit) as end:
        run("export", (*system, *out))
    assert not end.value.code
    manifest = Manifest.read(tmp_path / "bundle")
    assert {variant.target for variant in manifest.variants} == {"ort:cpu", "ort:cuda", "portable", "tensorrt"}
    model = manifest.models[0]
    for variant in manifest.variants:
        graph = onnx.load(tmp_path / "bundle" / variant.graphs["router"], load_external_data=False).graph
        past = next(value.type.tensor_type for value in graph.input if value.name.startswith("past"))
        item_size = onnx.helper.tensor_dtype_to_np_dtype(past.elem_type).itemsize
        expected = 2 * item_size * model.layers * model.kv_heads * model.head_size
        assert variant.kv_bytes_per_token(manifest.models[0]) == expected, (variant.target, variant.precision)
