"""Bundles with one base: what lies in them, how large they are, and what they refuse."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.numpy import load_file

from fusionroute.fr_export.bundle.variant import stored_weights
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.export import Request, check, export
from fusionroute.fr_export.precision.rank_budget import RankBudget
from fusionroute.runtime.archive import pack, unpack
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.errors import BundleError, InputError
from fusionroute.runtime.manifest import Manifest
from tests.support.adapters import make_adapted_system
from tests.support.bundles import edit
from tests.support.systems import Shape, make_model, make_system

Reports = dict[str, dict[str, Any]]
SHAPE = Shape(heads=4, kv_heads=2, head_dim=32, hidden=128, layers=1, vocab=1024, tokenizer=True)
OPTIONS: list[dict[str, Any]] = [{"r": 2, "target_modules": ["q_proj", "down_proj"]}, {"r": 4}, {"r": 4}]
PRECISIONS = ("fp32", "int8", "int4")


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> Request:
    """An export of a system of adapters with one base."""
    folder = tmp_path_factory.mktemp("shared")
    _, router, experts = make_adapted_system(folder, SHAPE, OPTIONS)
    return Request(
        None, router, experts, PRECISIONS, ("ort:cpu",), folder / "bundle", calibration="none", compare=64, shared_base=True, max_seq_len=64
    )


@pytest.fixture(scope="module")
def report(request_: Request) -> Reports:
    """By precision, the report of that export."""
    return {entry["precision"]: entry for entry in export(request_, Stages(Console(quiet=True)))["variants"]}


def test_a_bundle_holds_one_base_and_factors_once(request_: Request, report: Reports) -> None:
    """Precisions read the same factors: they do not depend on how the base is rounded."""
    manifest = Manifest.read(request_.out)
    assert manifest.format == 5, "an older runtime would not know `every_expert`"
    pairs = [variant.pair for variant in manifest.variants if variant.pair]
    assert len({pair.graph for pair in pairs}) == len(PRECISIONS) == len(manifest.variants)
    assert len({path for pair in pairs for path in pair.factors.values()}) == len(request_.experts)
    weights = [name for name in manifest.files if name.startswith("graphs/") and not name.endswith(".onnx")]
    adapting = [path for pair in pairs[:1] if pair.adapting for path in (pair.adapting.unadapted, pair.adapting.layout)]
    assert sorted(weights) == sorted(["graphs/weights/base.bin", *pairs[0].factors.values(), *adapting]) and len(adapting) == 2
    for path in pairs[0].factors.values():
        header = int.from_bytes((request_.out / path).read_bytes()[:8], "little")
        assert (8 + header) % 64 == 0, "readers map the values at cache lines"


def test_the_report_names_the_bytes_of_base_and_factors(request_: Request, report: Reports) -> None:
    manifest = Manifest.read(request_.out)
    for variant in manifest.variants:
        entry, pair = report[variant.precision], variant.pair
        assert pair is not None and entry["compared"] is not None
        factors = {name: (request_.out / path).stat().st_size for name, path in pair.factors.items()}
        assert entry["factors"] == factors
        base = sum(stored_weights(variant, request_.out).values())
        assert entry["bytes"] == base + sum(factors.values()) + sum((request_.out / path).stat().st_size for path in pair.graph_paths)
        for name, path in pair.factors.items():
            assert variant.weight_bytes[name] == sum(array.nbytes for array in load_file(request_.out / path).values())
        assert base / 2 < variant.weight_bytes["router"] <= base


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_shared_base_loses_no_more_than_whole_models(precision: str, request_: Request, report: Reports, tmp_path: Path) -> None:
    whole = replace(request_, out=tmp_path / "whole", shared_base=False, precisions=(precision,))
    (expected,) = export(whole, Stages(Console(quiet=True)))["variants"]
    kl = [entry["compared"]["decode"]["kl_mean"] for entry in (report[precision], expected)]
    assert 0 < kl[0] < 1.2 * kl[1]


def test_it_is_as_large_as_the_check_says(request_: Request, report: Reports) -> None:
    forecast = check(replace(request_, force=True), Stages(Console(quiet=True))).forecast
    for expected in forecast.variants:
        entry = report[expected["precision"]]
        graph = (request_.out / f"graphs/base.ort-cpu.{expected['precision']}.onnx").stat().st_size
        assert entry["bytes"] - graph == pytest.approx(expected["bytes"], rel=0.1)
    assert sum(file.stat().st_size for file in request_.out.rglob("*") if file.is_file()) == pytest.approx(forecast.disk_needed, rel=0.4)


def test_factors_count_among_the_files_of_a_bundle(request_: Request, report: Reports, tmp_path: Path) -> None:
    """Opening checks that they are there, and verifying their hash."""
    pack(Bundle.open(request_.out), tmp_path / "bundle.tar")
    unpack(tmp_path / "bundle.tar", tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    bundle.verify()
    file = next((tmp_path / "bundle" / "graphs" / "factors").iterdir())
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match=f"{file.name} was changed after the export"):
        Bundle.open(tmp_path / "bundle").verify()
    file.unlink()
    with pytest.raises(BundleError, match=f"lacks graphs/factors/{file.name}"):
        Bundle.open(tmp_path / "bundle")


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "an expert without factors": (
        lambda pair: pair["factors"].pop("expert0"),
        "has factors or graphs for expert1 instead of expert0, expert1",
    ),
    "no such graph": (lambda pair: pair.update(graph="graphs/none.onnx"), "the file graphs/none.onnx of the variant fp32 is not among"),
    "a path that leads out": (lambda pair: pair.update(graph="../x"), "is not a path inside the bundle"),
    "an unknown field": (lambda pair: pair.update(rank=4), "Extra inputs are not permitted"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_whose_pair_does_not_fit(name: str, request_: Request, report: Reports, tmp_path: Path) -> None:
    change, words = MANIFESTS[name]
    (tmp_path / "manifest.json").write_text((request_.out / "manifest.json").read_text())
    edit(tmp_path, lambda content: change(content["variants"][0]["pair"]))
    with pytest.raises(BundleError) as refusal:
        Manifest.read(tmp_path)
    assert words in str(refusal.value)


def test_an_expert_has_factors_or_a_graph_and_not_both(request_: Request, report: Reports, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text((request_.out / "manifest.json").read_text())
    edit(tmp_path, lambda content: content["variants"][0]["graphs"].update(expert1=content["variants"][0]["pair"]["graph"]))
    with pytest.raises(BundleError, match="has a graph for several models, and others for the same"):
        Manifest.read(tmp_path)


def test_what_cannot_share_is_refused_before_anything_is_written(request_: Request, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", SHAPE, 7, expert=True)
    request = replace(request_, experts={**request_.experts, "expert1": str(other)}, out=tmp_path / "bundle")
    with pytest.raises(
        InputError, match=r"^Expert 'expert1' \(.*\) and the router cannot share one base, since .* leave --shared-base out\.$"
    ):
        export(request, Stages(Console(quiet=True)))
    deeper = make_model(tmp_path / "deeper", replace(SHAPE, layers=2), 7, expert=True)
    with pytest.raises(InputError, match=r"their config\.json files describe two architectures"):
        export(replace(request, experts={**request_.experts, "expert1": str(deeper)}), Stages(Console(quiet=True)))
    assert not (tmp_path / "bundle").exists()


def test_factors_that_leave_out_too_much_are_refused_by_their_numbers(tmp_path: Path) -> None:
    """Two models with nothing in common: a rank of 1 explains next to nothing, the full rank all."""
    router, experts = make_system(tmp_path, Shape(heads=2, kv_heads=1, head_dim=16, hidden=32, layers=1, experts=1))
    request = Request(
        None, router, experts, ("fp32",), ("ort:cpu",), tmp_path / "bundle", calibration="none", compare=0, shared_base=True,
        budget=RankBudget(rank=1),
    )  # fmt: skip
    words = r"^Expert 'expert0' \(.*\) and the router cannot share one base, since factors of 1\.25 bits per weight leave out 9\d% of .*--shared-base auto\)\.$"
    for auto in (False, True):  # nothing would be left to share
        with pytest.raises(InputError, match=words):
            export(replace(request, leave_apart=auto), Stages(Console(quiet=True)))
    with pytest.raises(InputError, match="approximate full fine-tunes with --rank or --delta-bits"):
        export(replace(request, budget=None), Stages(Console(quiet=True)))
    assert not (tmp_path / "bundle").exists()
    entry = export(replace(request, budget=RankBudget(rank=32)), Stages(Console(quiet=True)))["approximated"]["expert0"]
    assert entry == {"bits": pytest.approx(entry["bits"]), "left": 0.0, "error": 0.0, "ranks": [32, 32]} and entry["bits"] > 32
