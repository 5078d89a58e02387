"""Quantised weights as TensorRT reads them: symmetric int8 with one scale per row, or int4 in blocks, scales of 8 significant bits.

Such a scale is the same number in fp16 and in bf16, so that rounding a model needs not know which its activations have.
https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html
"""

import numpy as np

from fusionroute.fr_export.precision.blockwise import Format

SIGNIFICANT = 8  # bits of bf16
SMALLEST = np.float32(2**-24)  # above 0 in fp16
LARGEST = 65_000.0  # a scale of 8 significant bits that fp16 holds
BLOCKS = (64, 32)  # the first that divides a matrix's width
CLIPS = (1.0, 0.95, 0.9, 0.875, 0.85, 0.8, 0.75, 0.7)  # shares of a block's range that are tried


def stepped(scales: np.ndarray) -> np.ndarray:
    """The next number of 8 significant bits that is no smaller and no finer than fp16's smallest, float32."""
    _, exponent = np.frexp(np.maximum(scales, SMALLEST))
    step = np.maximum(np.ldexp(np.float32(1), exponent - SIGNIFICANT), SMALLEST)
    return np.asarray(np.maximum(np.ceil(scales / step), 1) * step, np.float32)


def row_grid(rows: np.ndarray, importance: np.ndarray | None = None) -> tuple[np.ndarray, None]:
    """Scales float32 [R, 1] = max|row| / 127, of rows [R, 1, K]."""
    return stepped(np.maximum(rows.max(-1), -rows.min(-1)) / np.float32(127)), None


def block_grid(rows: np.ndarray, importance: np.ndarray | None = None) -> tuple[np.ndarray, None]:
    """Per block the scale float32 [R, blocks] of least squared error, weighted by `importance`, for values from −8 to 7."""
    largest = np.maximum(rows.max(-1), -rows.min(-1))
    best, scales = np.full(largest.shape, np.inf, np.float32), np.empty(largest.shape, np.float32)
    for clip in CLIPS:
        scale = stepped(largest * np.float32(clip) / np.float32(7))
        error = rows / scale[..., None]
        np.rint(error, out=error)
        np.clip(error, -8, 7, out=error)
        error *= scale[..., None]
        error -= rows
        np.square(error, out=error)
        squared = error.sum(-1) if importance is None else np.einsum("rbk,bk->rb", error, importance)
        better = squared < best
        best[better], scales[better] = squared[better], scale[better]
    return scales, None


def by_row(width: int) -> Format:
    """8 bits with one scale per row."""
    return Format(8, width, np.dtype(np.float32), False, row_grid, LARGEST * 127, signed=True)


def in_blocks(width: int) -> Format:
    """4 bits in blocks, which TensorRT wants to divide the width; 8 bits where none does."""
    block = next((block for block in BLOCKS if width % block == 0), None)
    return Format(4, block, np.dtype(np.float32), False, block_grid, LARGEST * 7, signed=True) if block else by_row(width)
