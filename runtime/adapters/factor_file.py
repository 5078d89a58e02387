"""One expert's factors in one safetensors file, which readers can map."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from fusionroute.runtime.manifest import File
from fusionroute.runtime.tensor_file import write_tensors


def write_factors(folder: Path, expert: str, shapes: Mapping[str, tuple[int, ...]], arrays: Iterable[np.ndarray]) -> tuple[Path, File]:
    """Write float32 arrays, in the order of their `shapes`, into a file named by expert and content.

    Returns its path, and what the manifest says of it.
    """
    path, sha256, size = write_tensors(folder, expert, {name: ("F32", shape) for name, shape in shapes.items()}, arrays, {})
    return path, File(sha256=sha256, bytes=size)
