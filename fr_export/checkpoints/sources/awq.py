"""AWQ checkpoints: `qweight`, `qzeros` and `scales` instead of `weight`.

The layout "gemm" of AutoAWQ (https://github.com/casper-hansen/AutoAWQ, WQLinear_GEMM): a 32-bit word holds eight
consecutive outputs of one input, the even ones in its low half and the odd ones in its high half.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fusionroute.fr_export.checkpoints.sources.grouped import GroupedTensor, Groups, unpacked
from fusionroute.fr_export.checkpoints.tensors import SafetensorsTensor
from fusionroute.runtime.errors import InputError

PARTS = {"qweight": "qweight", "qzeros": "qzeros", "scales": "scales"}
PER_WORD = 8
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # in a word, of the outputs 0 to 7


@dataclass(frozen=True)
class AwqTensor(GroupedTensor):
    """qweight int32 [in, out / 8], qzeros int32 [groups, out / 8], scales [groups, out]."""

    @property
    def has_zeros(self) -> bool:
        """Always."""
        return True

    def read_groups(self, parts: Mapping[str, Any], start: int, stop: int) -> Groups:
        """See `GroupedTensor.read_groups`."""
        first, last = start // PER_WORD, -(-stop // PER_WORD)

        def outputs(words: torch.Tensor) -> np.ndarray:
            values = unpacked(words, 4).reshape(len(words), -1, PER_WORD)[..., PLACES].reshape(len(words), -1)
            rows: np.ndarray = values[:, start - first * PER_WORD :][:, : stop - start].T
            return rows

        return Groups(outputs(parts["qweight"][:, first:last]), parts["scales"][:, start:stop].T, outputs(parts["qzeros"][:, first:last]))


def awq(where: str, settings: Mapping[str, Any], module: str, parts: Mapping[str, SafetensorsTensor]) -> GroupedTensor:
    """The weight of a module. Raises InputError for a width or layout that is not read here."""
    version, bits = str(settings.get("version", "gemm")).lower(), settings.get("bits", settings.get("w_bit", 4))
    if version != "gemm" or bits != 4:
        raise InputError(
            f"{where} is an AWQ checkpoint of version '{version}' with {bits} bits; expected gemm with 4: "
            "export from the checkpoint it was made from."
        )
    (width, _), (groups, out) = parts["qweight"].shape, parts["scales"].shape
    return AwqTensor(parts, (out, width), 4, groups)
