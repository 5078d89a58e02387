"""Gemma-2's residual stream beyond fp16's range: every precision of the default target stays finite and right."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.verify.torch_reference import load, reference
from fusionroute.runtime import FusionRuntime
from tests.support.exporting import ALL, export_checkpoints
from tests.support.systems import Shape, make_system

SCALE = 5e4


def test_activations_beyond_65504_do_not_overflow(tmp_path: Path) -> None:
    shape = Shape("gemma2", experts=2, layers=3)
    router, experts = make_system(tmp_path, shape)
    for folder in map(Path, (router, *experts.values())):
        tensors = load_file(folder / "model.safetensors")
        for name in tensors:
            if name.endswith("post_feedforward_layernorm.weight"):
                # the norm adds outputs of this size to the residual stream
                tensors[name] = SCALE * (1 + 0.1 * tensors[name])
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    bundle = export_checkpoints(tmp_path / "bundle", shape, router, experts)
    system = System.open(FAMILIES["gemma2"], router, experts)
    ids = [int(i) for i in np.random.default_rng(0).integers(3, shape.vocab, 60)]
    assert largest_activation(system, ids) > 65_504
    (expected,) = reference(system, [ids], (0.5, 0.5))
    for precision in ALL:
        with FusionRuntime.load(bundle, precision=precision) as runtime:
            for chunk in (512, 1):
                scores = runtime.score(ids, chunk=chunk)
                assert np.isfinite(scores.logits).all()
                same = scores.experts == expected.experts
                gap = np.abs(scores.logits - expected.logits)[same].mean() / expected.logits.std()
                assert same.mean() > (0.7 if precision == "int4" else 0.9)
                assert gap < {"fp32": 1e-5, "fp16": 0.01, "bf16": 0.08, "int8": 0.12, "int4": 1.0}[precision]


def largest_activation(system: System, ids: list[int]) -> float:
    """Largest |value| that a layer of the router passes on; what fp16 would have to hold."""
    model = load(system.router)
    peaks: list[float] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, out: peaks.append(float((out[0] if isinstance(out, tuple) else out).abs().max())))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), use_cache=False)
    return max(peaks)
