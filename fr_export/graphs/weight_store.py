"""Content-addressed weights: a tensor that several graphs, models or precisions share lies on disk once, named by its
SHA-256.

An export writes them as single files. When all graphs are written, `weight_files.py` gathers them in a few large ones.
"""

import hashlib
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from fusionroute.runtime.errors import InputError

FOLDER = "weights"  # below the graphs: ONNX readers refuse `..` and links in external data


@dataclass(frozen=True)
class Blob:
    """One stored byte sequence."""

    folder: Path
    sha256: str
    length: int

    @property
    def path(self) -> Path:
        """Its own file, until it moves into one with others."""
        return self.folder / f"{self.sha256}.bin"

    def tensor(self, name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.ExternalTensor:
        """The blob as an initialiser's external data; several initialisers may read one blob with different shapes."""
        location = f"{FOLDER}/{self.path.name}"
        return ir.ExternalTensor(location, 0, self.length, dtype, shape=ir.Shape(shape), name=name, base_dir=self.folder.parent)

    def read(self, dtype: np.dtype[Any]) -> np.ndarray:
        """The values, flat."""
        return np.fromfile(self.path, dtype)


class Store:
    """Writes blobs into `graphs/weights`, several at once if need be. `blobs` are those written, by their hash."""

    def __init__(self, graphs: Path):
        self.folder = graphs / FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        self.blobs: dict[str, Blob] = {}
        self._numbers = count(1)  # threads may draw from it at once

    def writer(self, weight: str) -> "Writer":
        """A new blob of a weight, written in pieces."""
        return Writer(self, self.folder / f"writing-{next(self._numbers)}", weight)

    def put(self, array: np.ndarray, weight: str) -> Blob:
        """A whole array at once. Raises InputError as `Writer.write` does."""
        with self.writer(weight) as writer:
            writer.write(array)
        return writer.blob


class Writer:
    """Streams one blob to disk while hashing it; on leaving the context it gets its name, or vanishes if that blob
    exists.
    """

    blob: Blob

    def __init__(self, store: Store, path: Path, weight: str):
        self.store, self.path, self.weight = store, path, weight
        self.hash = hashlib.sha256()
        self.length = 0

    def __enter__(self) -> "Writer":
        self.file = self.path.open("wb")
        return self

    def write(self, array: np.ndarray) -> None:
        """Append an array's bytes in row-major order. Raises InputError where a value is not finite."""
        check_finite(array, self.weight)
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        self.hash.update(data)
        self.file.write(data)
        self.length += len(data)

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.file.close()
        if kind is not None:
            self.path.unlink()
            return
        self.blob = Blob(self.store.folder, self.hash.hexdigest(), self.length)
        if self.blob.sha256 in self.store.blobs:
            self.path.unlink()
        else:
            self.path.replace(self.blob.path)
            self.store.blobs[self.blob.sha256] = self.blob


def check_finite(array: np.ndarray, weight: str) -> None:
    """Raise InputError where values, scales or norms that a graph is to hold are not finite."""
    if array.dtype.kind not in "iub" and not np.isfinite(array).all():
        raise InputError(f"The weight '{weight}' would hold NaN or infinity in {array.dtype}; export another precision.")
