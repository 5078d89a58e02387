"""bitsandbytes checkpoints: 4-bit codes of a table in blocks of one scale, or 8-bit integers with a scale per row.

https://github.com/bitsandbytes-foundation/bitsandbytes (`QuantState`, `dequantize_4bit`): a byte holds two consecutive
values, the first in its high half. Scales of blocks may be 8-bit codes of a second table themselves.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fusionroute.fr_export.checkpoints.sources.fp8 import Fp8Tensor
from fusionroute.fr_export.checkpoints.sources.grouped import opened, whole
from fusionroute.fr_export.checkpoints.tensors import ReadRows, SafetensorsTensor, StoredTensor
from fusionroute.runtime.errors import InputError

PARTS = {
    "weight": "weight", "SCB": "row scales", "weight_format": "format", "weight.absmax": "scales", "weight.quant_map": "table",
    "weight.nested_absmax": "scales of scales", "weight.nested_quant_map": "table of scales",
    "weight.quant_state.bitsandbytes__nf4": "state", "weight.quant_state.bitsandbytes__fp4": "state",
}  # fmt: skip


@dataclass(frozen=True)
class TableTensor:
    """weight uint8 [values / 2, 1]: codes of `table` float32 [16]; `scales` one for each `block` of consecutive values."""

    parts: Mapping[str, SafetensorsTensor]
    shape: tuple[int, ...]
    state: Mapping[str, Any]

    dtype = "F32"  # what dequantising gives

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of all parts."""
        return tuple(dict.fromkeys(part.file for part in self.parts.values()))

    @cached_property
    def scales(self) -> torch.Tensor:
        """float32 [blocks]."""
        scales = whole(self.parts["scales"])
        if scales.dtype != torch.uint8:
            return scales.float()
        blocks = torch.arange(len(scales)) // self.state["nested_blocksize"]
        values = whole(self.parts["table of scales"])[scales.long()] * whole(self.parts["scales of scales"])[blocks]
        return values + self.state["nested_offset"]

    @contextmanager
    def open(self) -> Iterator[ReadRows]:
        """See `StoredTensor.open`: table[code]·scale in fp32."""
        width, table, scales = self.shape[1], whole(self.parts["table"]).float(), self.scales
        with opened({"weight": self.parts["weight"]}) as parts:

            def read(start: int, stop: int) -> torch.Tensor:
                packed = parts["weight"][start * width // 2 : -(-stop * width // 2)].flatten()
                codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[start * width % 2 :][: (stop - start) * width]
                blocks = torch.arange(start * width, stop * width) // self.state["blocksize"]
                return (table[codes.long()] * scales[blocks]).reshape(-1, width)

            yield read


@dataclass(frozen=True)
class RowTensor(Fp8Tensor):
    """weight int8 [out, in], scales float32 [out]: the value of 127 in each row."""

    @contextmanager
    def open(self) -> Iterator[ReadRows]:
        """See `StoredTensor.open`: weight·scale / 127 in fp32."""
        with super().open() as read:
            yield lambda start, stop: read(start, stop) / 127


def bitsandbytes(where: str, settings: Mapping[str, Any], module: str, parts: Mapping[str, SafetensorsTensor]) -> StoredTensor:
    """The weight of a module. Raises InputError for a state that cannot be read."""
    if "state" not in parts:
        return RowTensor(parts["weight"], parts["row scales"], (1, parts["weight"].shape[1]))
    try:
        state = json.loads(bytes(whole(parts["state"]).tolist()))
        out, width = (int(length) for length in state["shape"])
        if out * width > 2 * parts["weight"].shape[0] or state["blocksize"] < 1:
            raise ValueError(f"shape {[out, width]} and blocks of {state['blocksize']}")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where} has a state of '{module}' that cannot be read ({error}): download it again.") from error
    _ = parts["table"], parts["scales"]
    return TableTensor(parts, (out, width), state)
