"""One expert's factors in one safetensors file, which readers can map: tensors begin at multiples of 64 bytes where
their sizes allow it. https://huggingface.co/docs/safetensors/index#format
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from fusionroute.runtime.manifest import File

LINE = 64  # bytes of a cache line
TYPES = {ir.DataType.FLOAT: "F32", ir.DataType.FLOAT16: "F16", ir.DataType.BFLOAT16: "BF16"}  # as safetensors calls them


def write_factors(
    folder: Path, expert: str, shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, ir.DataType], arrays: Iterable[np.ndarray]
) -> tuple[Path, File]:
    """Write arrays, in the order of their `shapes`, into a file named by expert and content. `types`: see TYPES.

    Returns its path, and what the manifest says of it.
    """
    end, entries = 0, {}
    for name, shape in shapes.items():
        start, end = end, end + int(types[name].itemsize) * math.prod(shape)
        entries[name] = {"dtype": TYPES[types[name]], "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % LINE)
    folder.mkdir(parents=True, exist_ok=True)
    path, digest = folder / f"{expert}.partial", hashlib.sha256()
    with path.open("wb") as file:
        for piece in (len(header).to_bytes(8, "little"), header):
            digest.update(piece)
            file.write(piece)
        for array, (name, shape) in zip(arrays, shapes.items(), strict=True):
            assert array.shape == shape and array.dtype == types[name].numpy()
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            digest.update(data)
            file.write(data)
    named = path.replace(folder / f"{expert}-{digest.hexdigest()[:8]}.safetensors")
    return named, File(sha256=digest.hexdigest(), bytes=named.stat().st_size)
