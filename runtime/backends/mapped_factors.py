"""An expert's factors, mapped from their safetensors file: https://huggingface.co/docs/safetensors/index#format."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from fusionroute.runtime.errors import BundleError, one_line

PREFIX = 8  # bytes that tell how long the header is


def map_factors(path: Path) -> dict[str, np.ndarray]:
    """Name → float32 array, read-only and mapped: processes share its memory, and pages are read when they are used.

    Raises BundleError for a file that is not one of float32 tensors.
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
    if dtype != "F32" or end - first != 4 * math.prod(shape) or not start <= first <= end <= len(data) or first % 4:
        raise ValueError(f"{dtype} {shape} at bytes {first} to {end} of {len(data)}")
    values: np.ndarray = data[first:end].view(np.float32).reshape(shape)
    return values
