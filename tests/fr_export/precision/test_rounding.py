"""What 8-bit inputs cost, held against torch whose inputs are rounded by a hook."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.precision import rounding
from fusionroute.fr_export.verify.torch_reference import load
from tests.support.calibration import fit_context, known, observe, passed_on, traced
from tests.support.systems import Shape, make_system

IDS = [np.random.default_rng(0).integers(3, 300, 50).astype(np.int32), np.array([5, 9, 200], np.int32)]
PRODUCTS = {
    "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "self_attn.o_proj": ("o_proj",),
    "mlp.gate_proj": ("gate_proj",),
    "mlp.up_proj": ("up_proj",),
    "mlp.down_proj": ("down_proj",),
}


@pytest.mark.parametrize("family", ["llama3", "gemma2"])
def test_the_measurement_is_that_of_torch(family: str, tmp_path: Path) -> None:
    router, experts = make_system(tmp_path, Shape(family, experts=1, layers=2))
    system = System.open(FAMILIES[family], router, experts)
    graph, weights = traced(system), system.router.weights
    seen = observe(graph, weights, [list(map(int, ids)) for ids in IDS])
    found = rounding.measure(fit_context(graph, weights, known(IDS), tmp_path / "store"), seen)
    assert len(found) == 2 * len(PRODUCTS)
    model = load(system.router)
    for layer in range(2):
        exact = passed_on(model, layer, IDS)
        for part, names in PRODUCTS.items():
            matrix = f"model.model.layers.{layer}.{part}.weight"
            step = float(np.float32(seen[matrix].absmax() / 127))
            modules = [model.get_submodule(f"model.layers.{layer}.{part.split('.')[0]}.{name}") for name in names]
            hooks = [
                m.register_forward_pre_hook(lambda _, args, s=step: (torch.clamp(torch.round(args[0] / s), -127, 127) * s,))
                for m in modules
            ]
            changed = passed_on(model, layer, IDS)
            for hook in hooks:
                hook.remove()
            expected = float(((changed - exact).square().sum(-1) / exact.square().sum(-1)).mean())
            assert found[matrix] == pytest.approx(expected, rel=2e-2) and expected > 0, part


def test_a_model_that_was_never_asked(tmp_path: Path) -> None:
    router, experts = make_system(tmp_path, Shape(experts=1, layers=1))
    system = System.open(FAMILIES["llama3"], router, experts)
    assert rounding.measure(fit_context(traced(system), system.router.weights, known([]), tmp_path / "store"), {}) == {}
