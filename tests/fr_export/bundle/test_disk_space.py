"""The estimate of a bundle's size on disk, against real exports and against plain counting."""

import math
import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from fusionroute.fr_export.bundle.disk_space import free_space, stored_values, weights_on_disk
from fusionroute.fr_export.bundle.variant import stored_weights
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.export import Request, check, export
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.precision import SCHEMES
from fusionroute.fr_export.precision.int4 import BUDGET
from fusionroute.runtime.manifest import Manifest
from tests.support.systems import Shape, make_system

TARGETS = ("ort:cpu", "ort:cuda", "portable", "tensorrt", "tensorrt:10.3")
PRECISIONS = ("fp32", "fp16", "int8", "int8-wo", "int4")


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> Request:
    folder = tmp_path_factory.mktemp("room")
    router, experts = make_system(folder, Shape("llama3", experts=1, layers=1, hidden=256, heads=8, vocab=1024))
    family = FAMILIES["llama3"]
    return Request(family, router, experts, PRECISIONS, ("ort:cpu",), folder / "bundle", max_seq_len=16, calibration="none", force=True)


@pytest.fixture(scope="module")
def system(request_: Request) -> System:
    return System.open(request_.family, request_.router, request_.experts, max_seq_len=16)


def needed(system: System, targets: tuple[str, ...], engines: bool = False) -> int:
    plan = [(target, SCHEMES[target][name]) for target in targets for name in PRECISIONS if name in SCHEMES[target]]
    return weights_on_disk(stored_values(system), plan, False, engines)


def test_a_further_target_never_needs_less(system: System) -> None:
    for count in range(1, len(TARGETS)):
        for targets in combinations(TARGETS, count):
            for further in set(TARGETS) - set(targets):
                assert needed(system, (*targets, further)) >= needed(system, targets), (targets, further)
    assert needed(system, ("ort:cpu", "tensorrt")) > needed(system, ("ort:cpu",)), "its int8 has files of its own"


def test_half_precision_of_one_dialect_is_stored_once(system: System) -> None:
    assert needed(system, ("ort:cpu", "ort:cuda")) == needed(system, ("ort:cpu",))


def test_engines_hold_the_weights_again(system: System) -> None:
    values = sum(math.prod(entry.shape) for model in system.models for entry in model.weights.entries.values())
    bits = sum(SCHEMES["tensorrt"][name].bits for name in PRECISIONS)
    assert needed(system, ("ort:cpu", "tensorrt"), True) - needed(system, ("ort:cpu", "tensorrt")) == pytest.approx(
        bits * values / 8, abs=8
    )


def test_a_bundle_is_as_large_as_the_check_says(request_: Request, system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts the weights alone: graphs and tables are small beside real weights."""
    targets = ("ort:cpu", "ort:cuda", "portable")
    monkeypatch.setattr("fusionroute.fr_export.export.measure", lambda *_: ({}, "its size is measured here"))
    request = replace(request_, targets=targets)
    forecast = check(request, Stages(Console(quiet=True))).forecast
    export(request, Stages(Console(quiet=True)))
    stored = sum(file.bytes for file in Manifest.read(request.out).files.values() if file.tensors)
    assert stored == pytest.approx(needed(system, targets), rel=0.1)
    assert needed(system, targets) <= forecast.disk_needed <= 1.05 * needed(system, targets)
    variants = Manifest.read(request.out).variants
    assert [(each["target"], each["precision"]) for each in forecast.variants] == [(each.target, each.precision) for each in variants]
    for expected, variant in zip(forecast.variants, variants, strict=True):
        weights = sum(stored_weights(variant, request.out).values())
        assert weights == pytest.approx(expected["bytes"], rel=0.06), expected


def test_calibration_may_spend_more_on_int4(system: System) -> None:
    values, plan = stored_values(system), [("ort:cpu", SCHEMES["ort:cpu"]["int4"])]
    assert weights_on_disk(values, plan, True, False) * 8 / values == pytest.approx(BUDGET)
    assert weights_on_disk(values, plan, False, False) * 8 / values == pytest.approx(SCHEMES["ort:cpu"]["int4"].bits)
    int8 = [("ort:cpu", SCHEMES["ort:cpu"]["int8"])]
    assert weights_on_disk(values, int8, True, False) == weights_on_disk(values, int8, False, False)


def test_equal_tensors_of_several_models_count_once(tmp_path: Path) -> None:
    """An embedding that fine-tuning has left alone is stored once, as in the bundle."""
    shape = Shape("llama3", experts=2, layers=1, hidden=256, heads=8, vocab=1024)
    router, experts = make_system(tmp_path, shape)
    before = stored_values(System.open(None, router, experts))
    embedding = "model.embed_tokens.weight"
    first = Path(experts["expert0"]) / "model.safetensors"
    save_file(load_file(first) | {embedding: load_file(Path(router) / "model.safetensors")[embedding]}, first, {"format": "pt"})
    assert before - stored_values(System.open(None, router, experts)) == 1024 * 256


def test_free_space_is_that_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    assert free_space(tmp_path / "a" / "b") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.01)
