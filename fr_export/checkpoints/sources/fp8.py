"""FP8 checkpoints: e4m3 weights with a scale for all of them, for each row, or for each tile."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fusionroute.fr_export.checkpoints.sources.grouped import opened, whole
from fusionroute.fr_export.checkpoints.tensors import ReadRows, SafetensorsTensor
from fusionroute.runtime.errors import InputError

PARTS = {"weight": "weight", "weight_scale": "scales", "weight_scale_inv": "scales"}


@dataclass(frozen=True)
class Fp8Tensor:
    """weight F8_E4M3 [out, in]; scales [rows of tiles, columns of tiles], each for a tile of the weight."""

    weight: SafetensorsTensor
    scales: SafetensorsTensor
    tile: tuple[int, int]

    dtype = "F32"  # what dequantising gives

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of both."""
        return tuple(dict.fromkeys((self.weight.file, self.scales.file)))

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight."""
        return self.weight.shape

    @contextmanager
    def open(self) -> Iterator[ReadRows]:
        """See `StoredTensor.open`: weight·scale in fp32."""
        tall, wide = self.tile
        scales = whole(self.scales).float()
        columns = torch.arange(self.shape[1]) // wide
        scales = scales.reshape(-(-self.shape[0] // tall), -1)[:, columns]
        with opened({"weight": self.weight}) as parts:
            yield lambda start, stop: parts["weight"][start:stop].float() * scales[torch.arange(start, stop) // tall]


def scaled(where: str, weight: SafetensorsTensor, scales: SafetensorsTensor, tile: tuple[int, int] | None) -> Fp8Tensor:
    """The values of an FP8 weight. `tile`: of block-wise scales; None for scales of the tensor or of its rows.

    Raises InputError for scales that do not fit.
    """
    out, width = weight.shape
    count = 1
    for length in scales.shape:
        count *= length
    if tile is None and count in (1, out):
        tile = (out, width) if count == 1 else (1, width)
    if tile is None or -(-out // tile[0]) * -(-width // tile[1]) != count:
        raise InputError(
            f"{where} has the scales {list(scales.shape)} for '{weight.name}' of shape {[out, width]}, which do not fit: download it again."
        )
    return Fp8Tensor(weight, scales, tile)


def fp8(where: str, settings: Mapping[str, Any], module: str, parts: Mapping[str, SafetensorsTensor]) -> Fp8Tensor:
    """The weight of a module: `weight_block_size` in the settings says how large tiles are."""
    if "scales" not in parts:
        raise InputError(f"{where} has no scale for '{module}.weight': download it again.")
    tile = settings.get("weight_block_size")
    return scaled(where, parts["weight"], parts["scales"], tuple(tile) if tile else None)
