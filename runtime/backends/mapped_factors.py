"""An expert's factors, mapped from their safetensors file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fusionroute.runtime.errors import BundleError, one_line
from fusionroute.runtime.tensor_file import TensorFile


def map_factors(path: Path) -> dict[str, np.ndarray]:
    """Name → float32 array, read-only and mapped: processes share its memory, and pages are read when they are used.

    Raises BundleError for a file that is not one of float32 tensors.
    """
    try:
        tensors = TensorFile(path).tensors
        if wrong := next((name for name, tensor in tensors.items() if tensor.dtype != "F32"), None):
            raise ValueError(f"{wrong} is {tensors[wrong].dtype}")
        return {name: tensor.values() for name, tensor in tensors.items()}
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} does not hold an expert's factors ({one_line(error)}); export the bundle again.") from error
