"""One expert's factors in one safetensors file, which readers can map."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from fusionroute.runtime.file_entry import File
from fusionroute.runtime.tensor_file import write_tensors


def write_factors(
    folder: Path, expert: str, entries: Mapping[str, tuple[str, tuple[int, ...]]], arrays: Iterable[np.ndarray]
) -> tuple[Path, File]:
    """Write arrays into a file named by expert and content. `entries`: see `write_tensors`.

    Returns its path, and what the manifest says of it.
    """
    path, digest = write_tensors(folder, expert, entries, arrays, {})
    return path, File.of(digest)
