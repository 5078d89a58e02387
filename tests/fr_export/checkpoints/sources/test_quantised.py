"""Quantised checkpoints of other tools: what is read is what their formats say, and blocks are the same values."""

from pathlib import Path

import pytest
import torch

from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.checkpoints.torch_model import torch_model
from tests.support.packed_checkpoints import FORMS, quantise
from tests.support.systems import Shape, make_model

SHAPE = Shape(heads=2, kv_heads=1, head_dim=32, hidden=64, layers=1)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_reads_as_its_codes_zeros_and_scales_say(form: str, tmp_path: Path) -> None:
    expected = quantise(make_model(tmp_path / "model", SHAPE, 0, expert=True), form)
    checkpoint = Checkpoint.open("math", str(tmp_path / "model"))
    assert set(checkpoint.weights.entries) == set(expected)
    for name, values in expected.items():
        assert torch.equal(torch.from_numpy(checkpoint.weights.read(name)), values), name
        with checkpoint.weights.entry(name).open() as read:  # slices that begin and end within words
            assert all(torch.equal(read(start, start + 5), values[start : start + 5]) for start in (0, 3, 9)), name
    assert (form in ("gptq act-order", "packed, act-order", "gptq 2")) != ("takes over" in checkpoint.source.notes[0])
    assert checkpoint.source.kind == "full" and "quantised already" in checkpoint.source.notes[0]
    torch_model(checkpoint)(torch.arange(5)[None])
