"""Tensors made from a base and an adapter while they are read: nothing merged is kept on disk or in memory."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from fusionroute.fr_export.checkpoints.tensors import ReadRows, StoredTensor

ROWS = 4096  # read at a time where a whole tensor is passed over


@dataclass(frozen=True)
class MergedTensor(ABC):
    """A tensor over another one, of its shape. It names the dtype of its base; what is read is fp32."""

    base: StoredTensor

    @property
    @abstractmethod
    def parts(self) -> tuple[StoredTensor, ...]:
        """What an adapter brings."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Those of the adapter, which messages name, then those of the base."""
        return tuple(dict.fromkeys(file for tensor in (*self.parts, self.base) for file in tensor.files))

    @property
    def dtype(self) -> str:
        """That of the base."""
        return self.base.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the base."""
        return self.base.shape


@dataclass(frozen=True)
class LowRankTensor(MergedTensor):
    """base + scale · B·A in fp32. base [rows, columns], a [rank, columns], b [rows, rank]."""

    a: StoredTensor
    b: StoredTensor
    scale: float

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """See `MergedTensor.parts`."""
        return (self.a, self.b)

    @contextmanager
    def open(self) -> Iterator[ReadRows]:
        """See `StoredTensor.open`. A is held in memory, B is read with the rows."""
        with self.base.open() as base, self.b.open() as b:
            a = whole(self.a) * self.scale
            yield lambda start, stop: torch.addmm(base(start, stop).float(), b(start, stop).float(), a)


@dataclass(frozen=True)
class AddedTensor(MergedTensor):
    """base + scale · delta in fp32, of one shape: a bias, and what an adapter adds to it."""

    delta: StoredTensor
    scale: float

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """See `MergedTensor.parts`."""
        return (self.delta,)

    @contextmanager
    def open(self) -> Iterator[ReadRows]:
        """See `StoredTensor.open`."""
        with self.base.open() as base, self.delta.open() as delta:
            yield lambda start, stop: base(start, stop).float() + self.scale * delta(start, stop).float()


@dataclass(frozen=True)
class TransposedTensor:
    """A small matrix with rows and columns exchanged: PEFT stores the factors of an embedding so."""

    stored: StoredTensor

    @property
    def files(self) -> tuple[Path, ...]:
        """Those of the matrix."""
        return self.stored.files

    @property
    def dtype(self) -> str:
        """That of the matrix."""
        return self.stored.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """[columns, rows] of the matrix."""
        return self.stored.shape[::-1]

    @contextmanager
    def open(self) -> Iterator[ReadRows]:
        """See `StoredTensor.open`. The matrix is held in memory."""
        matrix = whole(self.stored).T.contiguous()
        yield lambda start, stop: matrix[start:stop]


@dataclass(frozen=True)
class RowNormTensor(MergedTensor):
    """DoRA of a linear layer (arXiv:2402.09353): every row of `base` [rows, columns] brought to a norm.

    magnitude [rows].
    """

    magnitude: StoredTensor

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """See `MergedTensor.parts`."""
        return (self.magnitude,)

    @contextmanager
    def open(self) -> Iterator[ReadRows]:
        """See `StoredTensor.open`."""
        with self.base.open() as rows, self.magnitude.open() as magnitude:

            def read(start: int, stop: int) -> torch.Tensor:
                part = rows(start, stop).float()
                return part * (magnitude(start, stop).float() / torch.linalg.norm(part, dim=1))[:, None]

            yield read


@dataclass(frozen=True)
class ColumnNormTensor(MergedTensor):
    """DoRA of an embedding: every column of `base` [rows, columns] brought to a norm. magnitude [columns]."""

    magnitude: StoredTensor

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """See `MergedTensor.parts`."""
        return (self.magnitude,)

    @cached_property
    def factors(self) -> torch.Tensor:
        """What each column is multiplied by, float32 [columns]. The first use reads all rows."""
        squares = torch.zeros(self.shape[1], dtype=torch.float64)
        with self.base.open() as rows:
            for start in range(0, self.shape[0], ROWS):
                squares += rows(start, min(start + ROWS, self.shape[0])).double().square().sum(0)
        return (whole(self.magnitude) / squares.sqrt()).float()

    @contextmanager
    def open(self) -> Iterator[ReadRows]:
        """See `StoredTensor.open`."""
        factors = self.factors
        with self.base.open() as rows:
            yield lambda start, stop: rows(start, stop).float() * factors


@dataclass(frozen=True)
class ReplacedRowsTensor(MergedTensor):
    """`base` [rows, columns] with row ids[n] replaced by row n of `rows` [len(ids), columns]."""

    rows: StoredTensor
    ids: tuple[int, ...]

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """See `MergedTensor.parts`."""
        return (self.rows,)

    @contextmanager
    def open(self) -> Iterator[ReadRows]:
        """See `StoredTensor.open`. The replaced rows are held in memory."""
        rows, ids = whole(self.rows), torch.tensor(self.ids)

        with self.base.open() as base:

            def read(start: int, stop: int) -> torch.Tensor:
                part, inside = base(start, stop).to(torch.float32, copy=True), (ids >= start) & (ids < stop)
                part[ids[inside] - start] = rows[inside]
                return part

            yield read


def whole(stored: StoredTensor) -> torch.Tensor:
    """A small tensor in fp32."""
    with stored.open() as read:
        return read(0, stored.shape[0] if stored.shape else 0).float()
