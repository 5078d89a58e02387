"""Tensors that are stored in quantised blocks: a precision may take these over as they are."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from fusionroute.fr_export.checkpoints.tensors import StoredTensor


class Blocks(NamedTuple):
    """A slice of rows: value = (code − zero)·scale, in fp32.

    codes uint8 [R, blocks, block], scales float32 or float16 [R, blocks], zeros uint8 [R, blocks], or None where every
    zero point is 2^(bits − 1).
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None


ReadBlocks = Callable[[int, int], Blocks]  # start, stop → these rows


@dataclass(frozen=True)
class BlockLayout:
    """How a matrix is stored: `bits` per value, in blocks of `block` values along its rows."""

    bits: int
    block: int
    scale_type: np.dtype
    zeros: bool


@runtime_checkable
class BlockStored(StoredTensor, Protocol):
    """A `StoredTensor` that also offers its blocks."""

    @property
    def layout(self) -> BlockLayout | None:
        """How its blocks lie; None where they are no runs of equal length."""
        ...

    def open_blocks(self) -> AbstractContextManager[ReadBlocks]:
        """A function that reads rows of blocks, while the files are open."""
        ...
