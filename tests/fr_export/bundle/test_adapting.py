"""Adapters that are added to a bundle with one base are the experts that an export would have made of them."""

import json
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file, save_file

from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.export import Request, export
from fusionroute.fr_export.precision.rank_budget import RankBudget
from fusionroute.fr_export.verify import torch_reference
from fusionroute.runtime import FusionRuntime, InputError
from fusionroute.runtime.adapters.expert_files import add_expert, remove_expert
from fusionroute.runtime.adapters.lora_adapter import LoraAdapter
from fusionroute.runtime.adapters.unadapted import AdapterFactors, Unadapted, read_layout
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.manifest import Manifest
from tests.support.adapters import TARGETS, make_adapted_system, make_adapter, peft_model
from tests.support.exporting import export_checkpoints
from tests.support.pairs import SharedSystem, export_shared
from tests.support.parity import check_parity
from tests.support.systems import Shape, make_model

SHAPE = Shape(heads=2, kv_heads=1, head_dim=16, hidden=32, layers=1, tokenizer=True)
NORMS = ["input_layernorm", "norm"]
OPTIONS: list[dict[str, Any]] = [{"r": 2, "modules_to_save": ["norm"]}, {"r": 4, "modules_to_save": NORMS}, {"r": 3}]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> SharedSystem:
    """A router and experts of several ranks, the router and an expert with norms of their own."""
    return export_shared(tmp_path_factory.mktemp("shared"), SHAPE, OPTIONS, ("fp32", "int8"))


ADAPTERS = st.fixed_dictionaries(
    {"r": st.integers(1, 5)},
    optional={
        "target_modules": st.lists(st.sampled_from(TARGETS), min_size=1, unique=True),
        "modules_to_save": st.sampled_from([["norm"], ["input_layernorm"], NORMS]),
        "use_rslora": st.just(True),
        "lora_alpha": st.integers(1, 9),
        "rank_pattern": st.just({"q_proj": 6, "down_proj": 1}),
        "alpha_pattern": st.just({"up_proj": 3.0}),
    },
)


@settings(max_examples=8, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(options=ADAPTERS, dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_factors_turn_the_router_into_peft_s_model(
    system: SharedSystem, tmp_path_factory: pytest.TempPathFactory, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """For every matrix and norm, against the weights that PEFT merges."""
    folder = make_adapter(system.base, tmp_path_factory.mktemp("adapter"), 9, **options)
    values = {name: value.to(dtype) for name, value in load_file(folder / "adapter_model.safetensors").items()}
    save_file(values, folder / "adapter_model.safetensors")
    pair = Manifest.read(system.bundle).variants[0].pair
    assert pair is not None and pair.adapting is not None
    layout = read_layout(system.bundle / pair.adapting.layout)
    factors = AdapterFactors(layout, Unadapted.read(system.bundle / pair.adapting.unadapted), LoraAdapter.open(folder, "new"))
    arrays = dict(zip(factors.shapes, factors.arrays(), strict=True))
    router, expert = (peft_model(system.base, Path(path)).merge_and_unload().state_dict() for path in (system.router, str(folder)))
    matrices = 0
    for group in layout.plan.groups:
        for part, matrix in zip(np.split(arrays[group.a], len(group.matrices), axis=1), group.matrices, strict=True):
            ours, theirs = (np.concatenate([model[name].numpy() for name, _ in matrix.tensors]) for model in (router, expert))
            assert np.abs((part @ arrays[matrix.b]).T - (theirs - ours)).max() < 1e-5 * np.abs(theirs).max()
            matrices += len(matrix.tensors)
    assert matrices == len(TARGETS)
    for vector in layout.plan.vectors:
        ((tensor, _),) = vector.tensors
        assert np.allclose(arrays[vector.input], expert[tensor].numpy(), rtol=1e-6)
    assert len(layout.plan.vectors) == 3, "PEFT takes every module whose name ends in 'norm'"


@pytest.mark.parametrize("calibration", ["none", "12+30="])
def test_an_added_expert_is_the_exported_one(system: SharedSystem, calibration: str, tmp_path: Path) -> None:
    """Removed and added again, in any order, the bundle is the exported one, byte for byte; scales of smoothing too."""
    bundle = system.bundle
    if calibration != "none":
        (prompts := tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{n}+{n}="}) + "\n" for n in range(12)))
        bundle = export_checkpoints(
            tmp_path / "bundle", SHAPE, system.router, system.experts, ("fp32", "int8"), calibration=str(prompts), shared_base=True
        )
        layouts = {variant.pair.adapting.layout for variant in Manifest.read(bundle).variants if variant.pair and variant.pair.adapting}
        assert len(layouts) == 2, "calibration scales the base in int8"
    expected = {path.relative_to(bundle): path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    manifest = Manifest.read(bundle)
    for names in (["expert0"], ["expert1"]):
        reduce(lambda _, name: remove_expert(bundle, name), names, manifest)
        reduce(lambda _, name: add_expert(bundle, name, Path(system.experts[name])), names, manifest)
        Bundle.open(bundle).verify()
        assert Manifest.read(bundle) == manifest
        after = {path.relative_to(bundle): path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
        assert all(after[name] == data for name, data in expected.items() if name.name != "manifest.json") and len(after) == len(expected)


@pytest.mark.parametrize(("target", "precision"), [("ort:cuda", "fp16"), ("tensorrt", "bf16")])
def test_an_expert_that_is_added_for_a_gpu_is_the_exported_one(target: str, precision: str, tmp_path: Path) -> None:
    """In the type of the graph, and where engines fix the rank, filled up with zeros: byte for byte."""
    system = export_shared(tmp_path, SHAPE, OPTIONS, (precision,), (target,))
    bundle = system.bundle
    expected = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file() and path.name != "manifest.json"}
    manifest = Manifest.read(bundle)
    remove_expert(bundle, "expert0")
    assert Manifest.read(bundle).routing_rows == ["expert0", "expert1"]
    add_expert(bundle, "expert0", Path(system.experts["expert0"]))
    Bundle.open(bundle).verify()
    assert Manifest.read(bundle) == manifest
    assert {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file() and path.name != "manifest.json"} == expected
    if target.startswith("tensorrt"):  # of rank 8: the largest, 2 + 4, rounded up
        high = make_adapter(system.base, tmp_path / "high", 5, r=7)
        with pytest.raises(
            InputError, match=r"have rank \d+ together in 'model\.layers\.0\..*', and the graph takes \d+: train an adapter of a lower"
        ):
            add_expert(bundle, "expert0", high, replace=True)
        assert Manifest.read(bundle) == manifest


def test_an_adapter_may_take_the_place_of_an_approximated_expert(tmp_path: Path) -> None:
    """A full fine-tune whose factors have all ranks; then an adapter in its row, against PEFT."""
    base, router, experts = make_adapted_system(tmp_path, SHAPE, [{"r": 2}, {"r": 4}])
    tuned = make_model(tmp_path / "tuned", SHAPE, 11, expert=True)
    out = tmp_path / "bundle"
    request = Request(
        None, router, {"tuned": str(tuned), **experts}, ("fp32",), ("ort:cpu",), out, calibration="none", compare=0, shared_base=True,
        budget=RankBudget(rank=32), max_seq_len=64,
    )  # fmt: skip
    head = {"routing_head.weight": torch.randn(2, SHAPE.hidden, generator=torch.Generator().manual_seed(3))}
    save_file(head, Path(router) / "routing_head.safetensors")
    export(request, Stages(Console(quiet=True)))
    new = make_adapter(base, tmp_path / "new", 20, r=3)
    remove_expert(out, "tuned")
    added = add_expert(out, "tuned", new)
    assert added.experts == ["tuned", "expert0"]
    model, ids = peft_model(base, new), np.random.default_rng(5).integers(3, 300, 30).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    with FusionRuntime.load(out, "fp32", "cpu") as rt:
        assert rt.generate(ids, 4).experts
        scores = rt.backend.experts[0].cache().forward(ids, range(len(ids))).logits
    assert np.abs(np.asarray(scores) - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("family", ["llama3", "gemma2"])
def test_an_added_expert_gives_the_logits_of_peft(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter that the export has not seen, in the row of a removed one."""
    shape = Shape(family, heads=2, kv_heads=1, head_dim=16, hidden=32, layers=2, tokenizer=True)
    shared = export_shared(tmp_path, shape, OPTIONS)
    new = make_adapter(shared.base, tmp_path / "new", 20, r=6, target_modules=TARGETS[2:])
    remove_expert(shared.bundle, "expert1")
    add_expert(shared.bundle, "expert1", new)

    def load(checkpoint: Checkpoint) -> Any:
        return peft_model(shared.base, checkpoint.folder).get_base_model()

    monkeypatch.setattr(torch_reference, "load", load)
    ids = np.random.default_rng(5).integers(3, 300, 60).tolist()
    check_parity(shared.bundle, System.open(None, shared.router, shared.experts | {"expert1": str(new)}), ids, 20)
