"""Which matrices keep 8 bits in int4: the measurement against torch, and the choice within its budget."""

from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.export import Request, export
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.graphs.decoder_blocks import matrices
from fusionroute.fr_export.precision import int4, sensitive
from fusionroute.fr_export.precision.blockwise import nearest, widened
from fusionroute.fr_export.precision.int8 import SMALL
from fusionroute.fr_export.verify.torch_reference import load
from tests.support.calibration import fit_context, known, passed_on, traced
from tests.support.systems import Shape, make_system

IDS = [np.random.default_rng(0).integers(3, 300, 50).astype(np.int32), np.array([5, 9, 200], np.int32)]


@pytest.mark.parametrize("family", ["llama3", "gemma2"])
def test_the_measurement_is_that_of_torch(family: str, tmp_path: Path) -> None:
    router, experts = make_system(tmp_path, Shape(family, experts=1, layers=2))
    system = System.open(FAMILIES[family], router, experts)
    graph = traced(system)
    errors = sensitive.measure(graph, system.router.weights, IDS, dict.fromkeys(matrices(graph), int4.FORMAT))
    assert len(errors) == 10  # five products a layer
    for layer in range(2):
        for part, names in (("self_attn.qkv_proj", ("q", "k", "v")), ("self_attn.o_proj", ("o",)), ("mlp.down_proj", ("down",))):
            model = load(system.router)
            exact = passed_on(model, layer, IDS)
            block = part.split(".")[0]
            for name in names:
                weight = model.get_submodule(f"model.layers.{layer}.{block}.{name}_proj").weight
                rounded = widened(nearest(weight.detach().numpy(), int4.FORMAT), int4.FORMAT.bits, weight.shape[1])
                weight.data = torch.from_numpy(rounded.copy())
            changed = passed_on(model, layer, IDS)
            expected = float(((changed - exact).square().sum(-1) / exact.square().sum(-1)).mean())
            assert errors[f"model.model.layers.{layer}.{part}.weight"] == pytest.approx(expected, rel=1e-3), part


def test_the_worst_are_kept_within_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    router, experts = make_system(tmp_path, Shape(experts=1, layers=3))
    system = System.open(FAMILIES["llama3"], router, experts)
    graph = traced(system)
    names = [name for name in matrices(graph) if "layers" in name]
    sizes = {name: int(np.prod(graph.model.graph.initializers[name].shape)) for name in matrices(graph)}
    errors = {name: (10.0 if "o_proj" in name else 9.0 if "layers.1.mlp.up" in name else 1.0) * sizes[name] for name in names}
    monkeypatch.setattr(sensitive, "measure", lambda *_: errors)

    formats = dict.fromkeys(sizes, int4.FORMAT)

    def chosen(budget: float) -> tuple[str, ...]:
        return sensitive.sensitive(fit_context(graph, system.router.weights, known(IDS), tmp_path / "store"), formats, SMALL, budget)

    outputs = [name for name in names if "o_proj" in name]
    assert sorted(chosen(8.0)) == sorted([*outputs, "model.model.layers.1.mlp.up_proj.weight"])
    wider = SMALL.bits_per_weight - int4.FORMAT.bits_per_weight
    two = int4.FORMAT.bits_per_weight + wider * 2 * sizes[outputs[0]] / sum(sizes.values())
    assert sorted(chosen(two + 1e-9)) == outputs[:2] and len(chosen(two - 1e-9)) == 1
    assert chosen(int4.FORMAT.bits_per_weight) == ()
    assert sensitive.sensitive(fit_context(graph, system.router.weights, known([]), tmp_path / "store"), formats, SMALL, 8.0) == ()
    head = next(name for name in sizes if "layers" not in name)
    formats[head] = int4.FINE
    finer = (int4.FINE.bits_per_weight - int4.FORMAT.bits_per_weight) * sizes[head] / sum(sizes.values())
    assert len(chosen(two + finer - 1e-9)) == 1 and sorted(chosen(two + finer + 1e-9)) == outputs[:2]


def test_an_export_says_which(tmp_path: Path) -> None:
    """Queries and keys that are large make attention sharp, and rounding them moves it."""
    router, experts = make_system(tmp_path, Shape(experts=1, layers=4, tokenizer=True))
    for folder in (router, *experts.values()):
        tensors = load_file(Path(folder) / "model.safetensors")
        for name in tensors:
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                tensors[name] = 6 * tensors[name]
        save_file(tensors, Path(folder) / "model.safetensors", {"format": "pt"})
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one prompt\nanother prompt\nthe third\n")
    request = Request(FAMILIES["llama3"], router, experts, ("int4", "w8a8"), ("ort:cpu",), tmp_path / "bundle", calibration=str(prompts))
    report = export(request, Stages(Console(quiet=True)))
    int4_, w8a8 = report["variants"]
    assert any("qkv_proj" in name for name in int4_["fitted"]["router"]["sensitive"])
    assert int4.FORMAT.bits_per_weight < int4_["bits_per_weight"] <= 5.0
    for model in ("router", "expert0"):
        assert w8a8["fitted"][model]["w8a8_share"] >= 0.6
        assert all("proj" in name or "head" in name for name in w8a8["fitted"][model]["a16"])
    assert w8a8["compared"]["decode"]["perplexity_ratio"] == pytest.approx(1, abs=0.3)
