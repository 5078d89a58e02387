"""Checkpoints of compressed-tensors (llm-compressor, vLLM): packed integers, 8-bit integers, and FP8.

https://github.com/vllm-project/compressed-tensors (compressors `pack_quantized`, `naive_quantized`): integers are
signed in memory and 2^(bits − 1) higher in packed words.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusionroute.fr_export.checkpoints.sources.fp8 import scaled
from fusionroute.fr_export.checkpoints.sources.grouped import GroupedTensor, Groups, order_of, unpacked, whole
from fusionroute.fr_export.checkpoints.tensors import SafetensorsTensor, StoredTensor
from fusionroute.runtime.errors import InputError

PARTS = {
    "weight": "weight", "weight_packed": "packed", "weight_scale": "scales", "weight_zero_point": "zeros", "weight_shape": "shape",
    "weight_g_idx": "order",
}  # fmt: skip


@dataclass(frozen=True)
class PackedTensor(GroupedTensor):
    """packed int32 [out, in · bits / 32], scales [out, groups], zeros int32 [out · bits / 32, groups] or none."""

    @property
    def has_zeros(self) -> bool:
        """Where rounding was asymmetric."""
        return "zeros" in self.parts

    def read_groups(self, parts: Mapping[str, Any], start: int, stop: int) -> Groups:
        """See `GroupedTensor.read_groups`."""
        codes = unpacked(parts["packed"][start:stop], self.bits)[:, : self.shape[1]]
        zeros = None
        if "zeros" in parts:
            per_word = 32 // self.bits
            first = start // per_word
            words = parts["zeros"][first : -(-stop // per_word)].T  # groups first: a word holds consecutive outputs
            zeros = unpacked(words, self.bits)[:, start - first * per_word :][:, : stop - start].T
        return Groups(codes, parts["scales"][start:stop], zeros)


@dataclass(frozen=True)
class IntegerTensor(GroupedTensor):
    """weight int8 [out, in], scales [out, groups], zeros int8 [out, groups] or none."""

    @property
    def has_zeros(self) -> bool:
        """Where rounding was asymmetric."""
        return "zeros" in self.parts

    def read_groups(self, parts: Mapping[str, Any], start: int, stop: int) -> Groups:
        """See `GroupedTensor.read_groups`."""

        def unsigned(key: str) -> np.ndarray:
            values: np.ndarray = parts[key][start:stop].numpy().view(np.uint8) ^ np.uint8(128)
            return values

        return Groups(unsigned("weight"), parts["scales"][start:stop], unsigned("zeros") if "zeros" in parts else None)


def compressed(where: str, settings: Mapping[str, Any], module: str, parts: Mapping[str, SafetensorsTensor]) -> StoredTensor:
    """The weight of a module. Raises InputError for a form that is not read here."""
    refuse_transforms(where, settings)
    if "packed" in parts and parts["packed"].dtype == "I32":
        out, width = (int(length) for length in whole(parts["shape"]))
        groups = parts["scales"].shape[1]
        bits = next((bits for bits in (4, 8) if -(-width // (32 // bits)) == parts["packed"].shape[1]), None)
        if bits is None or ("zeros" in parts and parts["zeros"].dtype != "I32"):
            raise InputError(f"{where} packs '{module}.weight' in a form that is not read here: save it again with 4 or 8 bits.")
        order = order_of(parts.get("order"), width // groups)
        return PackedTensor({key: part for key, part in parts.items() if key not in ("order", "shape")}, (out, width), bits, groups, order)
    weight = parts.get("weight")
    if weight is not None and weight.dtype == "I8" and "scales" in parts:
        scales = parts["scales"]
        if len(scales.shape) == 2 and scales.shape[0] == weight.shape[0]:
            return IntegerTensor(
                {key: parts[key] for key in ("weight", "scales", "zeros") if key in parts}, weight.shape, 8, scales.shape[1]
            )
    if weight is not None and weight.dtype == "F8_E4M3" and "scales" in parts:
        return scaled(where, weight, parts["scales"], None)
    raise InputError(
        f"{where} stores '{module}.weight' as {', '.join(f'{key} {part.dtype}' for key, part in sorted(parts.items()))}, which is not read "
        "here: export from the checkpoint it was made from."
    )


def refuse_transforms(where: str, settings: Mapping[str, Any]) -> None:
    """Raises InputError where weights were rotated or made sparse before they were rounded."""
    sparse = (settings.get("sparsity_config") or {}).get("format", "dense")
    if sparse != "dense" or settings.get("transform_config"):
        what = f"sparse weights ('{sparse}')" if sparse != "dense" else "transformed weights ('transform_config')"
        raise InputError(f"{where} holds {what}, which are not read here: export from the checkpoint it was made from.")
