"""Matrices stored as small integers in groups along the input axis, each with a scale and perhaps a zero point."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open

from fusionroute.fr_export.checkpoints.stored_blocks import BlockLayout, Blocks, ReadBlocks
from fusionroute.fr_export.checkpoints.tensors import ReadRows, SafetensorsTensor

BLOCKS = (256, 128, 64, 32, 16)  # values: what block-wise operators read


class Groups(NamedTuple):
    """A slice of rows. The value of column k in group g is (code − zero)·scale.

    codes uint8 [R, K], scales [R, groups] of the stored dtype, zeros uint8 [R, groups], or None where every zero point
    is 2^(bits − 1).
    """

    codes: np.ndarray
    scales: torch.Tensor
    zeros: np.ndarray | None


@dataclass(frozen=True)
class GroupedTensor(ABC):
    """A matrix [out, in] made of several stored tensors, `parts`; one of them is `scales`.

    `groups` is their number in a row. `order` int [in]: the group of each column; None where groups are runs of equal
    length.
    """

    parts: Mapping[str, SafetensorsTensor]
    shape: tuple[int, ...]
    bits: int
    groups: int
    order: np.ndarray | None = None

    dtype = "F32"  # what dequantising gives

    @property
    @abstractmethod
    def has_zeros(self) -> bool:
        """Whether zero points are stored."""

    @abstractmethod
    def read_groups(self, parts: Mapping[str, Any], start: int, stop: int) -> Groups:
        """Rows as they are stored. `parts` are safetensors' slices of the stored tensors."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of the stored tensors."""
        return tuple(dict.fromkeys(part.file for part in self.parts.values()))

    @contextmanager
    def open(self) -> Iterator[ReadRows]:
        """See `StoredTensor.open`: (code − zero)·scale in fp32."""
        columns = np.arange(self.shape[1]) // (self.shape[1] // self.groups) if self.order is None else self.order
        with opened(self.parts) as parts:

            def read(start: int, stop: int) -> torch.Tensor:
                codes, scales, zeros = self.read_groups(parts, start, stop)
                values = codes.astype(np.float32)
                values -= np.float32(1 << (self.bits - 1)) if zeros is None else zeros[:, columns]
                values *= scales.float().numpy()[:, columns]
                return torch.from_numpy(values)

            yield read

    @property
    def layout(self) -> BlockLayout | None:
        """See `BlockStored.layout`. A group that is longer than an operator's blocks is cut into some of one scale."""
        length = self.shape[1] // self.groups
        block = next((block for block in BLOCKS if length % block == 0), None)
        if self.order is not None or self.bits not in (4, 8) or block is None or length * self.groups != self.shape[1]:
            return None
        scale_type = np.float16 if self.parts["scales"].dtype == "F16" else np.float32
        return BlockLayout(self.bits, block, np.dtype(scale_type), self.has_zeros)

    @contextmanager
    def open_blocks(self) -> Iterator[ReadBlocks]:
        """See `BlockStored.open_blocks`."""
        layout = self.layout
        assert layout is not None
        times = self.shape[1] // self.groups // layout.block
        with opened(self.parts) as parts:

            def read(start: int, stop: int) -> Blocks:
                codes, scales, zeros = self.read_groups(parts, start, stop)
                widened = scales.float().numpy().astype(layout.scale_type)
                repeated = None if zeros is None else np.repeat(zeros, times, axis=1)
                return Blocks(codes.reshape(len(codes), -1, layout.block), np.repeat(widened, times, axis=1), repeated)

            yield read


@contextmanager
def opened(parts: Mapping[str, SafetensorsTensor]) -> Iterator[dict[str, Any]]:
    """safetensors' slices of stored tensors, while their files are open."""
    with ExitStack() as stack:
        yield {key: stack.enter_context(safe_open(part.file, framework="pt")).get_slice(part.name) for key, part in parts.items()}


def whole(part: SafetensorsTensor) -> torch.Tensor:
    """A small stored tensor."""
    with safe_open(part.file, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(part.name)
    return tensor


def unpacked(words: torch.Tensor, bits: int) -> np.ndarray:
    """The values uint8 [..., n · 32 / bits] in words int32 [..., n], the lowest bits first."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    spread: np.ndarray = (words.contiguous().numpy().view(np.uint32)[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    values: np.ndarray = spread.astype(np.uint8).reshape(*words.shape[:-1], -1)
    return values


def order_of(groups: SafetensorsTensor | None, length: int) -> np.ndarray | None:
    """The group of each column [in], or None where they are runs of `length`, or where none is assigned."""
    if groups is None:
        return None
    order: np.ndarray = whole(groups).numpy().astype(np.int64)
    regular = np.arange(len(order)) // length
    return None if bool((order < 0).all()) or np.array_equal(order, regular) else order
