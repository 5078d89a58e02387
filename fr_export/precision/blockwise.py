"""Weights in blocks along the input axis, each with a scale (and a zero point): the operators that read them, and how
they are stored.

com.microsoft MatMulNBits and GatherBlockQuantized read the same bytes, so that a tied embedding and head stand once:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from fusionroute.fr_export.graphs.graph import Graph, initializer, node, replace_node, users
from fusionroute.fr_export.graphs.weight_store import Blob, Store
from fusionroute.fr_export.precision.kernels import round_to_nearest
from fusionroute.runtime.errors import InputError

SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)  # the inverse of a smaller scale overflows
PIECE = 1 << 22  # values rounded at a time: each rounding makes copies
TYPES = {np.dtype(np.float32): ir.DataType.FLOAT, np.dtype(np.float16): ir.DataType.FLOAT16}


class Quantised(NamedTuple):
    """A slice of rows: value ≈ (q − zero)·scale.

    values uint8 [R, blocks, block] from 0 to 2^bits − 1 (the last block padded with its zero point), scales float32 or
    float16 [R, blocks], zeros uint8 [R, blocks], or None where every zero point is 2^(bits − 1).
    """

    values: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None


# (rows float32 [R, blocks, block], importance of each channel float32 [blocks, block] or None) → scales and zeros as in
# `Quantised`
Grid = Callable[[np.ndarray, np.ndarray | None], tuple[np.ndarray, np.ndarray | None]]


@dataclass(frozen=True)
class Format:
    """How a matrix is stored, and how the values that a block can take are chosen. Scales of type float16 are widened
    when loaded.
    """

    bits: int
    block: int
    scale_type: np.dtype
    zeros: bool
    grid: Grid
    largest: float = math.inf  # |weight| up to which every scale is finite
    signed: bool = False  # about zero on disk, instead of unsigned about 2^(bits − 1)

    @property
    def middle(self) -> int:
        """The zero point of formats that store none."""
        return 1 << (self.bits - 1)

    @property
    def bits_per_weight(self) -> float:
        """On disk, for matrices whose width is a multiple of the block."""
        return self.bits + (8 * self.scale_type.itemsize + self.bits * self.zeros) / self.block


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Two 4-bit values per byte along the last axis, the first in the low half (padded to whole bytes); 8-bit values as
    they are.
    """
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros_like(values[..., :1])], axis=-1)
    packed: np.ndarray = values[..., 0::2] | (values[..., 1::2] << 4)
    return packed


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """What `pack` packed, uint8."""
    return packed if bits == 8 else np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


@dataclass(frozen=True)
class Stored:
    """A quantised matrix in the store."""

    format: Format
    values: Blob
    scales: Blob
    zeros: Blob | None

    @property
    def bytes(self) -> int:
        """On disk."""
        return sum(blob.length for blob in (self.values, self.scales, self.zeros) if blob is not None)

    def widened(self, width: int) -> np.ndarray:
        """The matrix float32 [R, width] that products compute with, read back from the store."""
        fmt, blocks = self.format, -(-width // self.format.block)
        scales = self.scales.read(fmt.scale_type).reshape(-1, blocks)

        def whole(blob: Blob) -> np.ndarray:
            return unpack(blob.read(np.dtype(np.uint8)).reshape(len(scales), -1), fmt.bits)

        values = whole(self.values).reshape(*scales.shape, fmt.block)
        if fmt.signed:
            values = values ^ fmt.middle
        return widened(Quantised(values, scales, None if self.zeros is None else whole(self.zeros)[:, :blocks]), fmt.bits, width)


def widened(part: Quantised, bits: int, width: int) -> np.ndarray:
    """The rows float32 [R, width] that products compute with."""
    values = part.values.astype(np.float32)
    values -= 1 << (bits - 1) if part.zeros is None else part.zeros[..., None]
    values *= part.scales.astype(np.float32)[..., None]
    return values.reshape(len(values), -1)[:, :width]


def nearest(rows: np.ndarray, fmt: Format) -> Quantised:
    """Round fp32 rows [R, K] to the nearest values of their blocks."""
    rows = np.ascontiguousarray(blocked(rows, fmt.block), np.float32)
    scales, zeros = fmt.grid(rows, None)
    middle = np.full(scales.shape, fmt.middle, np.float32) if zeros is None else zeros.astype(np.float32)
    levels = np.empty(rows.shape, np.uint8)
    round_to_nearest(rows, scales.astype(np.float32), middle, 2**fmt.bits - 1, levels)
    return Quantised(levels, scales, zeros)


def in_range(parts: Iterable[np.ndarray], fmt: Format, name: str) -> Iterator[np.ndarray]:
    """The slices of the matrix `name`. Raises InputError where a value lies beyond what the format can hold."""
    for part in parts:
        if max(part.max(), -part.min()) > fmt.largest:
            raise InputError(
                f"The weight '{name}' holds values beyond the {fmt.largest:,.0f} that int{fmt.bits} can hold; export it as {'int8' if fmt.bits < 8 else 'fp32'}."
            )
        yield part


def store_blocks(parts: Iterable[Quantised], fmt: Format, store: Store, name: str) -> Stored:
    """Put the slices of the matrix `name` [out, in] into the store. Raises InputError for scales that are not finite."""
    with contextlib.ExitStack() as stack:
        values, scales = (stack.enter_context(store.writer(name)) for _ in range(2))
        zeros = stack.enter_context(store.writer(name)) if fmt.zeros else None
        for part in parts:
            values.write(pack(part.values ^ fmt.middle if fmt.signed else part.values, fmt.bits))
            scales.write(part.scales.astype(fmt.scale_type, copy=False))
            if zeros is not None and part.zeros is not None:
                zeros.write(pack(part.zeros, fmt.bits))
    return Stored(fmt, values.blob, scales.blob, zeros.blob if zeros else None)


def attach(graph: Graph, matrix: ir.Value, stored: Stored) -> None:
    """Replace the operators that read `matrix` [out, in] by ones that read what is stored."""
    inner, fmt = graph.model.graph, stored.format
    out, width = (int(dim) for dim in matrix.shape)
    blocks, depth = -(-width // fmt.block), fmt.block * fmt.bits // 8
    packed_zeros = -(-blocks * fmt.bits // 8)
    label = f"int{fmt.bits}"
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "product": {"values": (out, blocks, depth), "scale": (out * blocks,), "zero": (out * packed_zeros,)},
        "lookup": {"values": (out, blocks * depth), "scale": (out, blocks), "zero": (out, packed_zeros)},
    }
    blobs = {
        "values": (stored.values, ir.DataType.UINT8),
        "scale": (stored.scales, TYPES[fmt.scale_type]),
        "zero": (stored.zeros, ir.DataType.UINT8),
    }

    def operands(use: str, before: ir.Node) -> list[ir.Value | None]:
        inputs: list[ir.Value | None] = []
        for kind, (blob, dtype) in blobs.items():
            if blob is None:
                continue
            name, shape = f"{matrix.name}.{label if kind == 'values' else kind}.{use}", shapes[use][kind]
            value = initializer(inner, name, dtype, shape, blob.tensor(name, dtype, shape))
            if dtype == ir.DataType.FLOAT16:  # the products want scales of the activations' type
                wide = ir.Value(name=f"{name}.fp32", type=ir.TensorType(ir.DataType.FLOAT), shape=value.shape)
                node(inner, before, "Cast", [value], [wide], to=int(ir.DataType.FLOAT))
                value = wide
            inputs.append(value)
        return inputs

    products, lookups = users(matrix)
    if products:
        weight = operands("product", products[0])
        for product in products:
            result = product.outputs[0]
            fresh = ir.Value(name=f"{result.name}.{label}", type=result.type, shape=result.shape)
            node(
                inner, product, "com.microsoft::MatMulNBits", [product.inputs[0], *weight], [fresh],
                K=width, N=out, bits=fmt.bits, block_size=fmt.block, accuracy_level=4,
            )  # fmt: skip
            replace_node(inner, product, fresh)
    for lookup in lookups:
        result = lookup.outputs[0]
        fresh = ir.Value(name=f"{result.name}.{label}", type=result.type, shape=result.shape)
        table, *widths = operands("lookup", lookup)
        node(
            inner, lookup, "com.microsoft::GatherBlockQuantized", [table, lookup.inputs[1], *widths], [fresh],
            bits=fmt.bits, block_size=fmt.block, gather_axis=0, quantize_axis=1,
        )  # fmt: skip
        if blocks * fmt.block != width:
            fresh = _cut(inner, lookup, fresh, width)
        replace_node(inner, lookup, fresh)
    assert matrix.name is not None
    del inner.initializers[matrix.name]


def attached(graph: Graph, matrix: str, width: int) -> np.ndarray | None:
    """The rows float32 [out, width] that operators read since `attach`; None where it was not called."""
    values = graph.model.graph.initializers
    for bits, use in itertools.product((4, 8), ("product", "lookup")):
        if (packed := stored_value(values.get(f"{matrix}.int{bits}.{use}"))) is None:
            continue
        scales, zeros = (stored_value(values.get(f"{matrix}.{kind}.{use}")) for kind in ("scale", "zero"))
        assert scales is not None
        levels = unpack(packed.reshape(len(packed), -1), bits)
        scales = scales.reshape(len(levels), -1)
        points = None if zeros is None else unpack(zeros.reshape(len(levels), -1), bits)[:, : scales.shape[1]]
        return widened(Quantised(levels.reshape(*scales.shape, -1), scales, points), bits, width)
    return None


def stored_value(value: ir.Value | None) -> np.ndarray | None:
    """The values of an initialiser; None where there is none."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _cut(inner: ir.Graph, before: ir.Node, padded: ir.Value, width: int) -> ir.Value:
    """Drop the padding of the last block from an embedding row."""
    bounds = [
        initializer(
            inner,
            f"{padded.name}.{kind}",
            ir.DataType.INT64,
            (1,),
            ir.tensor(np.array([at], np.int64), name=f"{padded.name}.{kind}"),
        )
        for kind, at in (("start", 0), ("end", width), ("axis", 2))
    ]
    exact = ir.Value(name=f"{padded.name}.cut", type=padded.type, shape=padded.shape)
    node(inner, before, "Slice", [padded, *bounds], [exact])
    padded.shape = None
    return exact


def blocked(rows: np.ndarray, block: int) -> np.ndarray:
    """Rows [R, K] as [R, blocks, block], padded with zeros."""
    count, width = rows.shape
    blocks = -(-width // block)
    if blocks * block != width:
        rows = np.pad(rows, ((0, 0), (0, blocks * block - width)))
    return rows.reshape(count, blocks, block)


def sliced(parts: Iterator[np.ndarray], channels: int) -> Iterator[np.ndarray]:
    """Slices of at most PIECE values."""
    step = max(1, PIECE // channels)
    for part in parts:
        for start in range(0, len(part), step):
            yield part[start : start + step]
