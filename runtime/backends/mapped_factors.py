"""An expert's factors, mapped from their safetensors file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fusionroute.runtime.errors import BundleError, one_line
from fusionroute.runtime.tensor_file import TensorFile


def map_factors(path: Path) -> dict[str, np.ndarray]:
    """Name → array, read-only and mapped: processes share its memory, and pages are read when they are used.

    float32, float16, or uint16 with the bits of bf16, which numpy does not have. Raises BundleError for a file that is
    not one of such tensors.
    """
    try:
        return {name: tensor.stored() for name, tensor in TensorFile(path).tensors.items()}
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} does not hold an expert's factors ({one_line(error)}); export the bundle again.") from error
