"""GPTQ checkpoints: `qweight`, `qzeros`, `scales` and `g_idx` instead of `weight`.

The layout of AutoGPTQ and GPTQModel (https://github.com/ModelCloud/GPTQModel): a 32-bit word holds consecutive inputs
of one output; of zero points, consecutive outputs of one group. The format "gptq" stores zero points less 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fusionroute.fr_export.checkpoints.sources.grouped import GroupedTensor, Groups, order_of, unpacked
from fusionroute.fr_export.checkpoints.tensors import SafetensorsTensor
from fusionroute.runtime.errors import InputError

PARTS = {"qweight": "qweight", "qzeros": "qzeros", "scales": "scales", "g_idx": "order"}
WIDTHS = (2, 4, 8)  # 3-bit values cross words
LESS = {"gptq": 1, "gptq_v2": 0}  # what stored zero points lack


@dataclass(frozen=True)
class GptqTensor(GroupedTensor):
    """qweight int32 [in · bits / 32, out], qzeros int32 [groups, out · bits / 32], scales [groups, out]."""

    less: int = 1

    @property
    def has_zeros(self) -> bool:
        """Always."""
        return True

    def read_groups(self, parts: Mapping[str, Any], start: int, stop: int) -> Groups:
        """See `GroupedTensor.read_groups`."""
        codes = unpacked(parts["qweight"][:, start:stop].T, self.bits)
        per_word = 32 // self.bits
        first = start // per_word
        zeros = unpacked(parts["qzeros"][:, first : -(-stop // per_word)], self.bits)[:, start - first * per_word :][:, : stop - start]
        return Groups(codes, parts["scales"][:, start:stop].T, ((zeros + self.less) & ((1 << self.bits) - 1)).T)


def gptq(where: str, settings: Mapping[str, Any], module: str, parts: Mapping[str, SafetensorsTensor]) -> GroupedTensor:
    """The weight of a module. Raises InputError for a width or format that is not read here."""
    form = settings.get("checkpoint_format") or "gptq"
    if form not in LESS:
        raise InputError(
            f"{where} is a GPTQ checkpoint of the format '{form}'; expected {' or '.join(LESS)}: save it again as one of them."
        )
    bits = settings.get("bits")
    if bits not in WIDTHS:
        raise InputError(f"{where} has GPTQ weights of {bits} bits; expected 2, 4 or 8: export from the checkpoint it was made from.")
    packed, out = parts["qweight"].shape
    groups = parts["scales"].shape[0]
    width = packed * 32 // bits
    order = order_of(parts.get("order"), width // groups)
    return GptqTensor({key: part for key, part in parts.items() if key != "order"}, (out, width), bits, groups, order, LESS[form])
