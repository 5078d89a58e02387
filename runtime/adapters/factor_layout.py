"""How low-rank factors of checkpoint tensors lie in the inputs of a graph for a pair of models.

The matrices that read one value share an input a, and each has an input b. A matrix of the graph may be stacked from
several tensors of the checkpoint (query, key and value): their factors stand in blocks, with zeros between.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from pydantic import Field

from fusionroute.runtime.file_entry import Size, Strict

Count = Annotated[int, Field(ge=1)]


class Matrix(Strict):
    """A matrix [N, K] of the graph. b: its input [r, N]; size: N. tensors: those stacked along its rows, and how many rows
    each has; none of an embedding that is looked up, to which no factors of tensors are added.
    """

    b: str
    size: Count
    tensors: list[tuple[str, Count]]


class Group(Strict):
    """Matrices that read one value of `width` K. a: their input [K, m·r], of which each takes r columns. rank: r, None where
    it may be any.
    """

    a: str
    width: Count
    rank: Count | None = None
    matrices: Annotated[list[Matrix], Field(min_length=1)]


class Vector(Strict):
    """An input that an expert has values of its own for: those of tensors of these sizes in a row, plus `offset`."""

    input: str
    tensors: Annotated[list[tuple[str, Size]], Field(min_length=1)]
    offset: float


class Plan(Strict):
    """All inputs for an expert, in their order."""

    groups: list[Group]
    vectors: list[Vector]


@dataclass(frozen=True)
class Factor:
    """b·a, added to a tensor [N, K]. read: its a float32 [rank, K] and its b float32 [N, rank]."""

    rank: int
    read: Callable[[], tuple[np.ndarray, np.ndarray]]


Factors = Mapping[str, Sequence[Factor]]  # checkpoint tensor → what is added to it
# input b → a float32 [K, r] and b float32 [r, N] of a whole matrix, in place of factors of its tensors
Whole = Mapping[str, tuple[np.ndarray, np.ndarray]]
NONE: Whole = {}


@dataclass(frozen=True)
class FactorLayout:
    """The plan, and the scales of the graph's weights, which factors must have too: float32, by what they scale.

    columns: input b → [K]. rows: input b → [N], or the input of a vector → [size]. types: of inputs that are not float32,
    as safetensors names them.
    """

    plan: Plan
    columns: Mapping[str, np.ndarray]
    rows: Mapping[str, np.ndarray]
    types: Mapping[str, str] = field(default_factory=dict)

    def shapes(self, factors: Factors, whole: Whole = NONE) -> dict[str, tuple[int, ...]]:
        """The inputs of an expert with such factors, by name.

        The matrices of a group have one rank: the graph's, or else the largest of theirs and at least 1, since ONNX
        Runtime 1.23 splits nothing empty; what they do not need of it is zero.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        for group in self.plan.groups:
            rank = group.rank or max(1, *(rank_of(matrix, factors, whole) for matrix in group.matrices))
            shapes[group.a] = group.width, len(group.matrices) * rank
            shapes |= {matrix.b: (rank, matrix.size) for matrix in group.matrices}
        return shapes | {vector.input: (sum(size for _, size in vector.tensors),) for vector in self.plan.vectors}

    def arrays(self, factors: Factors, vector: Callable[[str], np.ndarray], whole: Whole = NONE) -> Iterator[np.ndarray]:
        """Their values, float32, in the order of `shapes`. vector: the expert's values of a checkpoint's tensor."""
        shapes = self.shapes(factors, whole)
        for group in self.plan.groups:
            a = np.zeros(shapes[group.a], np.float32)
            every_b = [np.zeros(shapes[matrix.b], np.float32) for matrix in group.matrices]
            for matrix, part, b in zip(group.matrices, np.split(a, len(every_b), axis=1), every_b, strict=True):
                if matrix.b in whole:
                    own_a, own_b = whole[matrix.b]
                    part[:, : len(own_b)], b[: len(own_b)] = own_a, own_b
                else:
                    fill(matrix, factors, part, b)
                self._scale(matrix, part, b)
            yield a
            yield from every_b
        for each in self.plan.vectors:
            values = np.concatenate([vector(tensor) for tensor, _ in each.tensors]) + np.float32(each.offset)
            yield values * self.rows[each.input] if each.input in self.rows else values

    def _scale(self, matrix: Matrix, a: np.ndarray, b: np.ndarray) -> None:
        """Give a matrix's factors the scales of its columns and rows."""
        if matrix.b in self.columns:
            a *= self.columns[matrix.b][:, None]
        if matrix.b in self.rows:
            b *= self.rows[matrix.b]


def rank_of(matrix: Matrix, factors: Factors, whole: Whole) -> int:
    """How many ranks the factors of a matrix have."""
    if matrix.b in whole:
        return len(whole[matrix.b][1])
    return sum(factor.rank for name, _ in matrix.tensors for factor in factors.get(name, ()))


def fill(matrix: Matrix, factors: Factors, a: np.ndarray, b: np.ndarray) -> None:
    """Write the factors of a matrix's tensors into a [K, r] and b [r, N], in blocks."""
    row = column = 0
    for tensor, rows in matrix.tensors:
        for factor in factors.get(tensor, ()):
            block = slice(column, column + factor.rank)
            own_a, own_b = factor.read()
            a[:, block], b[block, row : row + rows] = own_a.T, own_b[:rows].T
            column = block.stop
        row += rows
