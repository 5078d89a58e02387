"""Quantised checkpoints of other tools: what is read is what their formats say, and blocks are the same values."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.checkpoints.sources.grouped import GroupedTensor
from fusionroute.fr_export.checkpoints.torch_model import torch_model
from fusionroute.runtime.errors import InputError
from tests.support.packed_checkpoints import (
    Rounded,
    awq_tensors,
    gptq_tensors,
    integer_tensors,
    packed_tensors,
    quantise_folder,
    rounded,
)
from tests.support.systems import Shape, make_model

SHAPE = Shape(heads=2, kv_heads=1, head_dim=32, hidden=64, layers=1)
COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}
Packer = Callable[[str, Rounded], dict[str, torch.Tensor]]

# name: settings, bits, group (0: a whole row), symmetric, act-order, packer
FORMS: dict[str, tuple[dict[str, Any], int, int, bool, bool, Packer]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, 4, 32, False, False, lambda m, q: gptq_tensors(m, q, 4)),
    "gptq 8": ({"quant_method": "gptq", "bits": 8}, 8, 32, True, False, lambda m, q: gptq_tensors(m, q, 8)),
    "gptq 2": ({"quant_method": "gptq", "bits": 2}, 2, 32, False, False, lambda m, q: gptq_tensors(m, q, 2)),
    "gptq v2": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}, 4, 16, False, False, lambda m, q: gptq_tensors(m, q, 4, 0),
    ),
    "gptq act-order": ({"quant_method": "gptq", "bits": 4, "desc_act": True}, 4, 32, False, True, lambda m, q: gptq_tensors(m, q, 4)),
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, 4, 32, False, False, lambda m, q: awq_tensors(m, q, 4)),
    "packed": (COMPRESSED, 4, 32, True, False, lambda m, q: packed_tensors(m, q, 4, symmetric=True)),
    "packed, zeros": (COMPRESSED, 4, 16, False, False, lambda m, q: packed_tensors(m, q, 4)),
    "packed, rows": (COMPRESSED, 4, 0, True, False, lambda m, q: packed_tensors(m, q, 4, symmetric=True)),
    "packed, act-order": (COMPRESSED, 4, 32, False, True, lambda m, q: packed_tensors(m, q, 4)),
    "packed 8": (COMPRESSED, 8, 64, True, False, lambda m, q: packed_tensors(m, q, 8, symmetric=True)),
    "int8": (COMPRESSED | {"format": "int-quantized"}, 8, 0, True, False, lambda m, q: integer_tensors(m, q, 8, symmetric=True)),
    "int8, zeros": (COMPRESSED | {"format": "int-quantized"}, 8, 32, False, False, lambda m, q: integer_tensors(m, q, 8)),
}  # fmt: skip


def quantised(folder: Path, form: str) -> dict[str, torch.Tensor]:
    """Write a checkpoint of a form; returns the values that it holds."""
    about, bits, group, symmetric, act_order, pack = FORMS[form]

    def make(module: str, weight: np.ndarray) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        width = weight.shape[1]
        length = group or width
        order = np.random.default_rng(0).permutation(width) // length if act_order else None
        q = rounded(weight, bits, length, symmetric, order)
        return pack(module, q), q.values()

    make_model(folder, SHAPE, 0, expert=True)
    return quantise_folder(folder, about, make)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_reads_as_its_codes_zeros_and_scales_say(form: str, tmp_path: Path) -> None:
    expected = quantised(tmp_path / "model", form)
    checkpoint = Checkpoint.open("math", str(tmp_path / "model"))
    assert set(checkpoint.weights.entries) == set(expected)
    for name, values in expected.items():
        assert torch.equal(torch.from_numpy(checkpoint.weights.read(name)), values), name
        with checkpoint.weights.entry(name).open() as read:  # slices that begin and end within words
            assert all(torch.equal(read(start, start + 5), values[start : start + 5]) for start in (0, 3, 9)), name
    assert (form in ("gptq act-order", "packed, act-order", "gptq 2")) != ("lie in blocks" in checkpoint.source.notes[0])
    assert checkpoint.source.kind == "full" and "quantised already" in checkpoint.source.notes[0]
    torch_model(checkpoint)(torch.arange(5)[None])
