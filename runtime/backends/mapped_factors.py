"""An expert's factors, mapped from their safetensors file: https://huggingface.co/docs/safetensors/index#format."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from fusionroute.runtime.errors import BundleError, one_line

PREFIX = 8  # bytes that tell how long the header is
TYPES: dict[str, type[np.generic]] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def map_factors(path: Path) -> dict[str, np.ndarray]:
    """Name → array, read-only and mapped: processes share its memory, and pages are read when they are used.

    float32, float16, or uint16 with the bits of bf16, which numpy does not have. Raises BundleError for a file that is
    not one of such tensors.
    """
    try:
        data = np.memmap(path, np.uint8, "r")
        start = PREFIX + int.from_bytes(data[:PREFIX].tobytes(), "little")
        entries = json.loads(data[PREFIX:start].tobytes())
        entries.pop("__metadata__", None)
        return {name: array(data, start, **entry) for name, entry in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise BundleError(f"{path} does not hold an expert's factors ({one_line(error)}); export the bundle again.") from error


def array(data: np.ndarray, start: int, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
    """One tensor of a file whose tensors begin at byte `start`. Raises ValueError, TypeError."""
    first, end = (start + offset for offset in data_offsets)
    if dtype not in TYPES:
        raise ValueError(f"values of type {dtype}")
    kind = np.dtype(TYPES[dtype])
    width = kind.itemsize
    if end - first != width * math.prod(shape) or not start <= first <= end <= len(data) or first % width:
        raise ValueError(f"{dtype} {shape} at bytes {first} to {end} of {len(data)}")
    values: np.ndarray = data[first:end].view(kind).reshape(shape)
    return values
