"""An expert's factors, mapped from their safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.errors import BundleError, one_line
from fusionroute.runtime.tensor_file import TensorFile


def factors_of(bundle: Bundle, paths: Mapping[str, str]) -> dict[str, dict[str, np.ndarray]]:
    """Expert → its factors, from their files in a bundle. Raises BundleError."""
    factors = {}
    for name, path in paths.items():
        with bundle.open_file(path) as file:
            factors[name] = map_factors(file)
    return factors


def map_factors(source: Path | BinaryIO) -> dict[str, np.ndarray]:
    """Name → array, read-only and mapped: processes share its memory, and pages are read when they are used.

    float32, float16, or uint16 with the bits of bf16, which numpy does not have. Raises BundleError for a file that is
    not one of such tensors.
    """
    try:
        return {name: tensor.stored() for name, tensor in TensorFile(source).tensors.items()}
    except (OSError, ValueError) as error:
        where = source if isinstance(source, Path) else source.name
        raise BundleError(f"{where} does not hold an expert's factors ({one_line(error)}); export the bundle again.") from error
