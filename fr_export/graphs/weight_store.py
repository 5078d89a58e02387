"""Content-addressed weights: a tensor that several graphs, models or precisions share lies on disk once, named by its
SHA-256.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

FOLDER = "weights"  # below the graphs: ONNX readers refuse `..` and links in external data


@dataclass(frozen=True)
class Blob:
    """One stored byte sequence."""

    folder: Path
    sha256: str
    length: int

    def tensor(self, name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.ExternalTensor:
        """The blob as an initialiser's external data; several initialisers may read one blob with different shapes."""
        location = f"{FOLDER}/{self.sha256}.bin"
        return ir.ExternalTensor(location, 0, self.length, dtype, shape=ir.Shape(shape), name=name, base_dir=self.folder.parent)

    def read(self, dtype: np.dtype[Any]) -> np.ndarray:
        """The values, flat."""
        return np.fromfile(self.folder / f"{self.sha256}.bin", dtype)


class Store:
    """Writes blobs into `graphs/weights`. `digests` holds what has been written: file name → (sha256, bytes)."""

    def __init__(self, graphs: Path):
        self.folder = graphs / FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        self.digests: dict[str, tuple[str, int]] = {}
        self.opened = 0

    def writer(self) -> "Writer":
        """A new blob, written in pieces."""
        self.opened += 1
        return Writer(self, self.folder / f"writing-{self.opened}")

    def put(self, array: np.ndarray) -> Blob:
        """A whole array at once."""
        with self.writer() as writer:
            writer.write(array)
        return writer.blob

    def keep(self, names: set[str]) -> None:
        """Remove every blob whose file is not among `names`: intermediate results that no graph reads."""
        for name in self.digests.keys() - names:
            (self.folder / name).unlink()
            del self.digests[name]


class Writer:
    """Streams one blob to disk while hashing it; on leaving the context it gets its name, or vanishes if that blob
    exists.
    """

    blob: Blob

    def __init__(self, store: Store, path: Path):
        self.store, self.path = store, path
        self.hash = hashlib.sha256()
        self.length = 0

    def __enter__(self) -> "Writer":
        self.file = self.path.open("wb")
        return self

    def write(self, array: np.ndarray) -> None:
        """Append an array's bytes in row-major order."""
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        self.hash.update(data)
        self.file.write(data)
        self.length += len(data)

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.file.close()
        if kind is not None:
            self.path.unlink()
            return
        digest = self.hash.hexdigest()
        self.blob = Blob(self.store.folder, digest, self.length)
        name = f"{digest}.bin"
        if name in self.store.digests:
            self.path.unlink()
        else:
            self.path.replace(self.store.folder / name)
            self.store.digests[name] = (digest, self.length)
