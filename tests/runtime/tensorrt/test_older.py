"""Graphs for TensorRT 10.3: which library gets which graphs, and an engine that TensorRT-RTX really builds."""

import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from rich.console import Console

from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.export import Request, export
from fusionroute.fr_export.families import FAMILIES
from fusionroute.runtime.__main__ import main
from fusionroute.runtime.backends import ENGINE_TARGETS, choose
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.errors import UnavailableError
from fusionroute.runtime.manifest import Engines, Manifest, Variant
from fusionroute.runtime.tensorrt.build import build
from fusionroute.runtime.tensorrt.engines import target_for
from fusionroute.runtime.tensorrt.library import OLDER, TARGET
from fusionroute.runtime.tensorrt.profile import profile_of, shapes
from tests.support.systems import Shape, make_system


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With graphs for TensorRT 10.3 only."""
    folder = tmp_path_factory.mktemp("older")
    router, experts = make_system(folder, Shape("gemma2", experts=1, layers=2, hidden=128))
    request = Request(
        FAMILIES["gemma2"], router, experts, ("bf16", "int8-wo"), (OLDER,), folder / "bundle", max_seq_len=64, calibration="none"
    )  # fmt: skip
    with patch("fusionroute.fr_export.export.measure", return_value=({}, "other tests compare it")):
        export(request, Stages(Console(quiet=True)))
    return folder / "bundle"


def with_targets(manifest: Manifest, *targets: str) -> Manifest:
    """The first variant, once for each target."""
    return manifest.model_copy(update={"variants": [manifest.variants[0].model_copy(update={"target": name}) for name in targets]})


def test_a_library_gets_the_newest_graphs_that_it_reads(bundle: Path) -> None:
    both, new, old = (with_targets(Manifest.read(bundle), *targets) for targets in ((TARGET, OLDER), (TARGET,), (OLDER,)))
    for version in ("10.3.0", "10.14.1.48"):
        assert target_for(both, "tensorrt", version) == target_for(old, "tensorrt", version) == OLDER
        sentence = rf"^The bundle's graphs for TensorRT need 10\.15 or newer, and this machine has {version}: export it with --target tensorrt:10\.3\.$"
        with pytest.raises(UnavailableError, match=sentence):
            target_for(new, "tensorrt", version)
    for flavour, version in (("tensorrt", "10.15.1"), ("tensorrt", "11.4.1"), ("rtx", "1.7.1.116")):
        assert target_for(both, flavour, version) == target_for(new, flavour, version) == TARGET
        assert target_for(old, flavour, version) == OLDER


def test_the_runtime_opens_the_graphs_that_have_engines(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    manifest = with_targets(opened.manifest, OLDER, TARGET)
    opened.manifest = manifest
    assert choose(opened, ENGINE_TARGETS, None, "tensorrt").target == TARGET
    names = {*manifest.variants[0].graphs, "fusion"}
    built = Engines(flavour="tensorrt", version="10.3.0", sms=[87], engines=dict.fromkeys(names, "e"), profile=profile_of(manifest))
    opened.manifest = manifest.model_copy(
        update={"variants": [manifest.variants[0].model_copy(update={"engines": [built]}), manifest.variants[1]]}
    )
    assert choose(opened, ENGINE_TARGETS, None, "tensorrt").target == OLDER
    assert choose(opened, ENGINE_TARGETS, None, "rtx").target == TARGET


def test_build_takes_the_graphs_of_the_installed_library(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.3.0"))
    monkeypatch.setattr("fusionroute.runtime.commands.build.device_sm", lambda: 87)
    seen: list[list[Variant]] = []

    def rebuild(folder: Path, variants: list[Variant], manifest: Manifest, *_: object) -> Manifest:
        seen.append(variants)
        return manifest.model_copy(update={"variants": []})

    monkeypatch.setattr("fusionroute.runtime.commands.build.rebuild", rebuild)
    monkeypatch.setattr(sys, "argv", ["runtime", "build", str(bundle), "--flavour", "tensorrt"])
    with pytest.raises(SystemExit) as end:
        main()
        sys.exit(0)
    assert not end.value.code, capsys.readouterr().err
    assert [(variant.target, variant.precision) for variant in seen[0]] == [(OLDER, "bf16"), (OLDER, "int8-wo")]


@pytest.mark.parametrize("number", [0, 1])
def test_an_engine_builds(bundle: Path, number: int, tmp_path: Path) -> None:
    manifest = Manifest.read(bundle)
    variant = manifest.variants[number]
    dimensions = shapes(profile_of(manifest), manifest.vocab_size)
    graph = bundle / variant.graphs["router"]
    build(graph, graph.read_bytes(), tmp_path / "router.engine", "rtx", dimensions, (86,), variant.operators)
    assert (tmp_path / "router.engine").stat().st_size > 100_000
