"""The estimate of a bundle's size on disk, against real exports and against plain counting."""

import math
from dataclasses import replace
from itertools import combinations

import pytest
from rich.console import Console

from fusionroute.fr_export.bundle.disk_space import stored_values, weights_on_disk
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.export import Request, export
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.precision import SCHEMES
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
    export(replace(request_, targets=targets), Stages(Console(quiet=True)))
    stored = sum(file.bytes for file in Manifest.read(request_.out).files.values() if file.tensors)
    assert stored == pytest.approx(needed(system, targets), rel=0.1)
