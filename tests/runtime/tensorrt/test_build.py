"""Engines that TensorRT-RTX really builds, without a GPU, from exported graphs; they can be run on GPUs only."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import onnx_ir as ir
import pytest
import tensorrt_rtx
from rich.console import Console

from fusionroute.fr_export.commands.main import run as run_verb
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.export import Request, export
from fusionroute.fr_export.families import FAMILIES
from fusionroute.runtime.__main__ import main
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.errors import BundleError, FusionError, InputError, UnavailableError
from fusionroute.runtime.manifest import Manifest
from fusionroute.runtime.tensorrt.build import build
from fusionroute.runtime.tensorrt.engines import rebuild
from fusionroute.runtime.tensorrt.operators import known
from fusionroute.runtime.tensorrt.profile import profile_of, shapes
from tests.support.systems import Shape, make_system

SMS = (86, 89, 120)


class Exported(NamedTuple):
    """A small system exported with engines in two precisions, and the report."""

    bundle: Path
    report: dict[str, list[dict[str, object]]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("engines")
    shape = Shape("gemma2", experts=1, layers=2, hidden=128, config={"tie_word_embeddings": True})
    router, experts = make_system(folder, shape)
    request = Request(
        FAMILIES["gemma2"],
        router,
        experts,
        ("bf16", "int4"),
        ("tensorrt",),
        folder / "bundle",
        max_seq_len=64,
        calibration="none",
        gpus=SMS,
    )
    return Exported(folder / "bundle", export(request, Stages(Console(quiet=True))))


def entry(bundle: Path, precision: str) -> object:
    """The engines of one precision."""
    (variant,) = [each for each in Manifest.read(bundle).variants if each.precision == precision]
    return variant.engines


def test_an_export_holds_engines_for_several_gpus(exported: Exported) -> None:
    opened = Bundle.open(exported.bundle)
    opened.verify()
    for variant, told in zip(opened.manifest.variants, exported.report["variants"], strict=True):
        (built,) = variant.engines
        assert (built.flavour, built.version, built.sms) == ("rtx", tensorrt_rtx.__version__, list(SMS))
        assert built.engines.keys() == {"router", "expert0", "fusion"}
        assert built.profile.tokens == built.profile.positions == built.profile.keys == 64
        sizes = {name: opened.manifest.files[path].bytes for name, path in built.engines.items()}
        assert told["engines"] == [{"flavour": "rtx", "version": built.version, "sms": list(SMS), "bytes": sizes}]
        assert all(opened.manifest.files[path].bytes > 100_000 for path in built.engines.values())
        assert told["not_compared"] is None
        assert told["compared"]["decode"]["routing_agreement"] > 0.8  # type: ignore[index]
        if variant.precision == "bf16":
            for how in ("chunks", "decode"):
                assert told["compared"][how]["greedy_agreement"] > 0.9  # type: ignore[index]
    assert "building bf16 engines" in [stage["name"] for stage in exported.report["stages"]]


def test_operators_of_the_graphs_are_known_and_too_new_for_10_3(exported: Exported) -> None:
    for variant in Manifest.read(exported.bundle).variants:
        operators = {n.op_type for name in variant.graphs.values() for n in ir.load(exported.bundle / name).graph}
        assert operators == set(variant.operators)
        assert operators <= known("10.15")
        assert operators - known("10.3") == {"TensorScatter", "RMSNormalization"}
    assert {n.op_type for n in ir.load(exported.bundle / "graphs/fusion.onnx").graph} <= known("10.3")


def test_a_changed_engine_is_refused(exported: Exported) -> None:
    path = next((exported.bundle / "engines").glob("router.rtx.bf16.*"))
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:1000] + b"x" + whole[1001:])
        with pytest.raises(BundleError, match=r"engine was changed after the export"):
            Bundle.open(exported.bundle).read(path.relative_to(exported.bundle).as_posix())
    finally:
        path.write_bytes(whole)


def run(monkeypatch: pytest.MonkeyPatch, entry: Callable[[], None], *arguments: object) -> int:
    """The exit status of a command line."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    try:
        entry()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def test_engines_are_rebuilt_on_the_device(exported: Exported, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name for path in (exported.bundle / "engines").iterdir()}
    assert (
        run(monkeypatch, main, "build", exported.bundle, "--precision", "int4", "--flavour", "rtx", "--sms", "sm89", "--workspace", 512)
        == 0
    )
    assert capsys.readouterr().out.startswith("int4: 3 engines, ")
    after = {path.name for path in (exported.bundle / "engines").iterdir()}
    assert after - before == {f"{name}.rtx.int4.sm89.engine" for name in ("router", "expert0", "fusion")}
    assert before < after
    Bundle.open(exported.bundle).verify()
    old = [path.stat().st_mtime_ns for path in (exported.bundle / "engines").glob("*sm89*")]
    monkeypatch.setattr("fusionroute.runtime.commands.build.device_sm", lambda: 89)  # without --sms: this machine's
    assert run(monkeypatch, main, "build", exported.bundle, "--precision", "int4", "--flavour", "rtx") == 0
    assert {path.name for path in (exported.bundle / "engines").iterdir()} == after, "the same GPUs: in place of the older ones"
    assert old != [path.stat().st_mtime_ns for path in (exported.bundle / "engines").glob("*sm89*")]
    Bundle.open(exported.bundle).verify()
    assert [built.sms for built in entry(exported.bundle, "int4")] == [list(SMS), [89]]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--flavour", "rtx"), "This machine has no NVIDIA GPU to build for: name GPUs with --sms"),
        (("--flavour", "tensorrt"), "build on the device that will run the engines"),
        (("--flavour", "tensorrt", "--sms", "sm86"), "TensorRT builds for the GPU it runs on: leave --sms out"),
        (("--flavour", "rtx", "--sms", "sm99"), "does not build for sm99: expected sm75, "),
        (("--precision", "fp32", "--sms", "sm86", "--flavour", "rtx"), "has no precision 'fp32' for tensorrt, only int4, bf16"),
    ],
)
def test_what_cannot_be_built_is_one_sentence(
    exported: Exported, arguments: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fusionroute.runtime.commands.build.device_sm", lambda: None)
    assert run(monkeypatch, main, "build", exported.bundle, *arguments) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and words in error and "\n" not in error


def test_an_unknown_flavour_is_wrong_usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, main, "build", tmp_path, "--flavour", "mlir") == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())  # without the box around it
    assert "unknown flavour 'mlir'; expected tensorrt, rtx" in shown


def test_a_graph_that_the_library_cannot_read_is_named_with_its_node(exported: Exported, tmp_path: Path) -> None:
    model = ir.load(exported.bundle / "graphs/fusion.onnx")
    node = next(n for n in model.graph if n.op_type == "TopK")
    node.name, node.op_type = "chooser", "Unique"
    ir.save(model, tmp_path / "broken.onnx")
    dimensions = shapes(profile_of(Manifest.read(exported.bundle)), 300)
    broken, content = tmp_path / "broken.onnx", (tmp_path / "broken.onnx").read_bytes()
    with pytest.raises(FusionError, match=r"^TensorRT-RTX \S+ cannot read broken.onnx \(.*chooser.*\); export it again\.$"):
        build(broken, content, tmp_path / "e.engine", "rtx", dimensions, (86,))
    with pytest.raises(UnavailableError, match=r"does not import the operator Unique:"):
        build(broken, content, tmp_path / "e.engine", "rtx", dimensions, (86,), ["TopK", "Unique"])
    assert not list(tmp_path.glob("*.engine"))


def test_a_build_that_fails_or_is_stopped_leaves_nothing(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest.read(exported.bundle)
    before = sorted(path.name for path in (exported.bundle / "engines").iterdir())

    def begin(name: str) -> Callable[[float], None]:
        def advance(share: float) -> None:
            if name == "expert0":
                raise KeyboardInterrupt

        return advance

    with pytest.raises(KeyboardInterrupt):
        rebuild(exported.bundle, [manifest.variants[0]], manifest, "rtx", (80,), None, begin)
    monkeypatch.setattr(
        "fusionroute.runtime.tensorrt.engines.replacing", lambda path: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(FusionError, match=r"^The engines cannot be written to .*engines \(No space left on device\): copy the bundle"):
        rebuild(exported.bundle, [manifest.variants[0]], manifest, "rtx", (80,), None, lambda _: lambda _: None)
    assert sorted(path.name for path in (exported.bundle / "engines").iterdir()) == before
    Bundle.open(exported.bundle).verify()


def test_progress_reaches_the_end(exported: Exported, tmp_path: Path) -> None:
    manifest = Manifest.read(exported.bundle)
    parts: list[float] = []
    graph, dimensions = exported.bundle / "graphs/fusion.onnx", shapes(profile_of(manifest), 300)
    build(graph, graph.read_bytes(), tmp_path / "e.engine", "rtx", dimensions, (86,), advance=parts.append)
    assert sum(parts) == pytest.approx(1.0) and all(part > 0 for part in parts)
    assert (tmp_path / "e.engine").stat().st_size > 100_000


def test_engines_for_gpus_that_the_library_does_not_know_are_refused_before_any_work(tmp_path: Path) -> None:
    request = Request(FAMILIES["llama3"], "nowhere", {"e": "nowhere"}, ("fp16",), ("tensorrt",), tmp_path / "out", gpus=(42,))
    with pytest.raises(InputError, match=r"does not build for sm42: expected"):
        export(request, Stages(Console(quiet=True)))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2", "llama3"])
def test_both_embedded_systems_in_every_precision(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sizes and times are those of docs/tensorrt.md."""
    precisions = f"{FAMILIES[family].half},int8,int8-wo,int4"
    start = time.perf_counter()
    status = run(
        monkeypatch,
        lambda: run_verb("export"),
        "--family",
        family,
        "--target",
        "rtx:sm86+sm89+sm120",
        "--precision",
        precisions,
        "--out",
        tmp_path / "b",
        "--json",
    )
    assert status == 0
    report = json.loads(capsys.readouterr().out)
    Bundle.open(tmp_path / "b").verify()
    seconds = {stage["name"]: stage["seconds"] for stage in report["stages"]}
    for variant in report["variants"]:
        (built,) = variant["engines"]
        assert built["sms"] == [86, 89, 120] and len(built["bytes"]) == 5
        took = seconds[f"building {variant['precision']} engines"]
        sizes = f"graphs {variant['bytes'] / 1e6:.2f} MB, engines {sum(built['bytes'].values()) / 1e6:.2f} MB"
        with capsys.disabled():
            print(f"{family} {variant['precision']}: {sizes}, router {built['bytes']['router'] / 1e6:.2f} MB, {took:.1f} s")
    with capsys.disabled():
        print(f"{time.perf_counter() - start:.0f} s in all")


@pytest.mark.slow
@pytest.mark.parametrize(("router_family", "expert_family"), [("gemma3", "phi3"), ("smollm3", "smollm3")])
def test_engines_of_layers_that_differ_and_of_packed_projections(router_family: str, expert_family: str, tmp_path: Path) -> None:
    """Two rotary tables, a part of each head, layers without; calibrated, so that int8 has 8-bit activations."""
    shape = Shape(router_family, experts=1, hidden=128, expert_family=expert_family)
    router, experts = make_system(tmp_path, shape)
    request = Request(
        FAMILIES[router_family], router, experts, ("bf16", "int8", "int4"), ("tensorrt",), tmp_path / "bundle", max_seq_len=64,
        calibration="builtin", gpus=SMS[:1],
    )  # fmt: skip
    report = export(request, Stages(Console(quiet=True)))
    for variant, told in zip(Manifest.read(tmp_path / "bundle").variants, report["variants"], strict=True):
        (built,) = variant.engines
        assert built.engines.keys() == {"router", "expert0", "fusion"}
        assert told["compared"]["decode"]["routing_agreement"] > 0.8
        if variant.precision != "int4":  # of random weights little is left in 4 bits
            assert told["compared"]["decode"]["greedy_agreement"] > {"bf16": 0.9, "int8": 0.8}[variant.precision]
