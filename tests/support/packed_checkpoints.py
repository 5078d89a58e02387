"""Quantised checkpoints as other tools write them, packed value by value as their formats are documented."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

PLACES = (0, 2, 4, 6, 1, 3, 5, 7)  # AWQ: the output that nibble i of a word holds


class Rounded(NamedTuple):
    """codes int [out, in], zeros int [out, groups], scales float16 [out, groups], order int [in]: each column's group."""

    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    order: np.ndarray

    def values(self) -> torch.Tensor:
        """What a reader must find, fp32."""
        return torch.from_numpy((self.codes - self.zeros[:, self.order]) * self.scales.astype(np.float32)[:, self.order]).float()


def rounded(weight: np.ndarray, bits: int, group: int, symmetric: bool = False, order: np.ndarray | None = None) -> Rounded:
    """Round to nearest in groups of columns; `order` scatters the columns over groups."""
    out, width = weight.shape
    order = np.arange(width) // group if order is None else order
    top = 2**bits - 1
    codes, zeros, scales = np.empty(weight.shape, int), np.empty((out, width // group), int), np.empty((out, width // group), np.float16)
    for number in range(width // group):
        part = weight[:, order == number]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            high = np.maximum(-low, high)
            low = -high
        scales[:, number] = (high - low) / top
        step = scales[:, number].astype(np.float32)
        zeros[:, number] = 2 ** (bits - 1) if symmetric else np.clip(np.rint(-low / step), 0, top)
        codes[:, order == number] = np.clip(np.rint(part / step[:, None]) + zeros[:, number, None], 0, top)
    return Rounded(codes, zeros, scales, order)


def words(values: np.ndarray, bits: int, axis: int, places: tuple[int, ...] | None = None) -> torch.Tensor:
    """Pack along an axis into int32: value i of a word at bit i · bits, or value places[i]."""
    per_word = 32 // bits
    values = np.moveaxis(values.astype(np.int64), axis, 0)
    packed = np.zeros((-(-len(values) // per_word), *values.shape[1:]), np.int64)
    for word in range(len(packed)):
        for place in range(per_word):
            at = word * per_word + (places[place] if places else place)
            if at < len(values):
                packed[word] |= values[at] << (place * bits)
    return torch.from_numpy(np.moveaxis(packed, 0, axis).astype(np.uint32).view(np.int32).copy()).contiguous()


def gptq_tensors(module: str, q: Rounded, bits: int, less: int = 1) -> dict[str, torch.Tensor]:
    return {
        f"{module}.qweight": words(q.codes.T, bits, 0),
        f"{module}.qzeros": words((q.zeros.T - less) & (2**bits - 1), bits, 1),
        f"{module}.scales": torch.from_numpy(q.scales.T.copy()),
        f"{module}.g_idx": torch.from_numpy(q.order.astype(np.int32)),
    }


def awq_tensors(module: str, q: Rounded, bits: int) -> dict[str, torch.Tensor]:
    return {
        f"{module}.qweight": words(q.codes.T, 4, 1, PLACES),
        f"{module}.qzeros": words(q.zeros.T, 4, 1, PLACES),
        f"{module}.scales": torch.from_numpy(q.scales.T.copy()),
    }


def packed_tensors(module: str, q: Rounded, bits: int, symmetric: bool = False) -> dict[str, torch.Tensor]:
    """compressed-tensors, pack-quantized."""
    tensors = {
        f"{module}.weight_packed": words(q.codes, bits, 1),
        f"{module}.weight_scale": torch.from_numpy(q.scales),
        f"{module}.weight_shape": torch.tensor(q.codes.shape),
    }
    if not symmetric:
        tensors[f"{module}.weight_zero_point"] = words(q.zeros, bits, 0)
    if (np.diff(q.order) < 0).any():
        tensors[f"{module}.weight_g_idx"] = torch.from_numpy(q.order.astype(np.int32))
    return tensors


def integer_tensors(module: str, q: Rounded, bits: int, symmetric: bool = False) -> dict[str, torch.Tensor]:
    """compressed-tensors, int-quantized."""
    tensors = {f"{module}.weight": torch.from_numpy((q.codes - 128).astype(np.int8)), f"{module}.weight_scale": torch.from_numpy(q.scales)}
    return tensors if symmetric else tensors | {f"{module}.weight_zero_point": torch.from_numpy((q.zeros - 128).astype(np.int8))}


Make = Callable[[str, np.ndarray], tuple[dict[str, torch.Tensor], torch.Tensor]]  # module, weight → tensors, their values


def quantise_folder(folder: Path, settings: dict[str, Any], make: Make) -> dict[str, torch.Tensor]:
    """Replace the matrices of decoder layers in a model folder. Returns all values that a reader must find, in fp32."""
    tensors = load_file(folder / "model.safetensors")
    values = {name: tensor.float() for name, tensor in tensors.items()}
    for name in [name for name, tensor in tensors.items() if ".layers." in name and tensor.ndim == 2]:
        module = name.removesuffix(".weight")
        packed, values[name] = make(module, tensors.pop(name).float().numpy())
        tensors |= packed
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return values


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


def quantise(folder: Path, form: str) -> dict[str, torch.Tensor]:
    """Turn a model folder into a checkpoint of a form; returns the values that it holds."""
    about, bits, group, symmetric, act_order, pack = FORMS[form]

    def make(module: str, weight: np.ndarray) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        width = weight.shape[1]
        length = group or width
        order = np.random.default_rng(0).permutation(width) // length if act_order else None
        q = rounded(weight, bits, length, symmetric, order)
        return pack(module, q), q.values()

    return quantise_folder(folder, about, make)
