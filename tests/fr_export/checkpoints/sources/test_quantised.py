"""Quantised checkpoints of other tools: what is read is what their formats say, and blocks are the same values."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.checkpoints.sources.low_rank import LowRankTensor
from fusionroute.fr_export.checkpoints.stored_blocks import BlockStored
from fusionroute.fr_export.checkpoints.torch_model import torch_model
from fusionroute.fr_export.checkpoints.weights import tensors_of
from fusionroute.runtime.errors import InputError
from tests.support.packed_checkpoints import FORMS, quantise, quantise_folder, words
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


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_is_that_of_the_package_compressed_tensors(bits: int) -> None:
    """The packer of these tests, and with it the reader, against the package that writes such checkpoints."""
    package = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = np.random.default_rng(0).integers(0, 2**bits, (24, 40))
    signed = torch.from_numpy((codes - 2 ** (bits - 1)).astype(np.int8))
    for axis in (0, 1):
        assert torch.equal(words(codes, bits, axis), package.pack_to_int32(signed, bits, packed_dim=axis))


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({"quant_method": "fp8", "weight_block_size": [32, 16]}, "tiles"),
        ({"quant_method": "fp8"}, "tensor"),
        ({"quant_method": "fbgemm_fp8"}, "rows"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "rows"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "tensor"),
    ],
)
def test_fp8_is_read_with_the_scale_of_its_tensor_row_or_tile(settings: dict[str, Any], scales: str, tmp_path: Path) -> None:
    def make(module: str, weight: np.ndarray) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        values = torch.from_numpy(weight)
        tall, wide = {"tiles": (32, 16), "tensor": values.shape, "rows": (1, values.shape[1])}[scales]
        rows, columns = -(-values.shape[0] // tall), -(-values.shape[1] // wide)
        scale = torch.rand(rows, columns) + 0.5
        large = torch.repeat_interleave(torch.repeat_interleave(scale, tall, 0), wide, 1)[: values.shape[0], : values.shape[1]]
        packed = (values / large).to(torch.float8_e4m3fn)
        shaped = scale.reshape(1) if scales == "tensor" else scale
        key = "weight_scale_inv" if settings["quant_method"] == "fp8" else "weight_scale"
        return {f"{module}.weight": packed, f"{module}.{key}": shaped}, packed.float() * large

    torch.manual_seed(0)
    folder = make_model(tmp_path / "model", replace(SHAPE, hidden=80, heads=4), 0, expert=True)  # no whole number of tiles
    expected = quantise_folder(folder, settings, make)
    checkpoint = Checkpoint.open("math", str(folder))
    for name, values in expected.items():
        assert torch.equal(torch.from_numpy(checkpoint.weights.read(name)), values), name
        with checkpoint.weights.entry(name).open() as read:
            assert torch.equal(read(3, 9), values[3:9])
    assert "quantised already" in checkpoint.source.notes[0] and "F8_E4M3" in checkpoint.source.dtypes


NF4 = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_in_4_bits_is_read_by_its_tables(nested: bool, tmp_path: Path) -> None:
    """Blocks of 64 consecutive values that may go on in the next row; scales may be codes themselves."""
    table, large_table = torch.tensor(NF4), torch.linspace(-1, 1, 256)

    def make(module: str, weight: np.ndarray) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        flat = torch.from_numpy(weight).flatten()
        count = -(-len(flat) // 64)
        padded = torch.nn.functional.pad(flat, (0, count * 64 - len(flat))).reshape(count, 64)
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
        scales = stored = padded.abs().amax(1)
        tensors = {}
        if nested:
            offset = float(scales.mean())
            groups = [(scales - offset)[first : first + 256] for first in range(0, count, 256)]
            tensors["weight.nested_absmax"] = torch.stack([group.abs().max() for group in groups])
            stored = torch.cat([(group[:, None] / group.abs().max() - large_table).abs().argmin(1) for group in groups]).to(torch.uint8)
            scales = torch.tensor(
                [
                    float(large_table[code]) * float(tensors["weight.nested_absmax"][at // 256]) + offset
                    for at, code in enumerate(stored.tolist())
                ]
            )
            tensors["weight.nested_quant_map"] = large_table.clone()
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        codes = (padded[..., None] / scales[:, None, None] - table).abs().argmin(-1).flatten()[: len(flat)]
        values = (table[codes] * scales.repeat_interleave(64)[: len(flat)]).reshape(weight.shape)
        tensors |= {
            "weight": (codes[0::2] * 16 + codes[1::2]).to(torch.uint8)[:, None], "weight.absmax": stored, "weight.quant_map": table.clone(),
            "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
        }  # fmt: skip
        return {f"{module}.{name}": tensor for name, tensor in tensors.items()}, values

    folder = make_model(tmp_path / "model", replace(SHAPE, hidden=80, heads=4), 0, expert=True)
    expected = quantise_folder(folder, {"quant_method": "bitsandbytes", "load_in_4bit": True}, make)
    check_rows(Checkpoint.open("math", str(folder)), expected)


def test_bitsandbytes_in_8_bits_has_a_scale_per_row(tmp_path: Path) -> None:
    def make(module: str, weight: np.ndarray) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        values = torch.from_numpy(weight)
        scales = values.abs().amax(1)
        codes = (values / scales[:, None] * 127).round().to(torch.int8)
        format_ = torch.tensor(0, dtype=torch.uint8)
        return {f"{module}.weight": codes, f"{module}.SCB": scales, f"{module}.weight_format": format_}, codes.float() * scales[
            :, None
        ] / 127

    folder = make_model(tmp_path / "model", SHAPE, 0, expert=True)
    expected = quantise_folder(folder, {"quant_method": "bitsandbytes", "load_in_8bit": True}, make)
    check_rows(Checkpoint.open("math", str(folder)), expected)


def test_an_adapter_lies_over_a_quantised_base(tmp_path: Path) -> None:
    """As after QLoRA: the merged rows are in fp32, and no longer blocks that a precision could take over."""
    folder = make_model(tmp_path / "model", SHAPE, 0, expert=True)
    expected = quantise(folder, "gptq")["model.layers.0.mlp.up_proj.weight"]
    base = Checkpoint.open("math", str(folder)).weights.entry("model.layers.0.mlp.up_proj.weight")
    a, b = torch.randn(4, 64), torch.randn(128, 4)
    save_file({"a": a, "b": b}, tmp_path / "adapter.safetensors")
    factors = tensors_of(tmp_path / "adapter.safetensors")
    merged = LowRankTensor(base, factors["a"], factors["b"], 2.0)
    with merged.open() as read:
        assert torch.allclose(read(3, 90), (expected + 2 * b @ a)[3:90], atol=1e-4)
    assert isinstance(base, BlockStored) and not isinstance(merged, BlockStored)


def check_rows(checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    """All tensors, and slices in the middle of some."""
    assert set(checkpoint.weights.entries) == set(expected)
    for name, values in expected.items():
        assert torch.allclose(torch.from_numpy(checkpoint.weights.read(name)), values, rtol=1e-6), name
        with checkpoint.weights.entry(name).open() as read:
            assert torch.allclose(read(3, 9).float(), values[3:9], rtol=1e-6)
    assert "quantised already (bitsandbytes, 7 matrices)" in checkpoint.source.notes[0]


@pytest.mark.parametrize(
    ("form", "changes", "words"),
    [
        ("gptq", {"bits": 3}, "GPTQ weights of 3 bits; expected 2, 4 or 8"),
        ("gptq", {"checkpoint_format": "marlin"}, "GPTQ checkpoint of the format 'marlin'; expected gptq or gptq_v2"),
        ("awq", {"version": "gemv"}, "AWQ checkpoint of version 'gemv' with 4 bits; expected gemm with 4"),
        ("packed", {"sparsity_config": {"format": "sparse-24-bitmask"}}, r"sparse weights \('sparse-24-bitmask'\)"),
        ("packed", {"transform_config": {"config_groups": {"R1": {}}}}, r"transformed weights \('transform_config'\)"),
        *(
            (("gptq", {"quant_method": name}, f"is quantised by '{name}'; read are gptq, awq, .*: export from the fp32"))
            for name in ("aqlm", "hqq")
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(form: str, changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", SHAPE, 0, expert=True)
    quantise(folder, form)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=rf"^Expert 'math' \(.*\) .*{words}.*\.$"):
        Checkpoint.open("math", str(folder))


def test_a_module_without_its_scales_is_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", SHAPE, 0, expert=True)
    quantise(folder, "gptq")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.scales"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"lacks the scales of 'model.layers.0.mlp.up_proj': download it again"):
        Checkpoint.open("math", str(folder))
