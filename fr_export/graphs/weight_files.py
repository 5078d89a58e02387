"""Weight files: the weights of one model in one file, in the order in which its graphs read them.

While graphs are written, every blob is a file of its own (`weight_store.py`): only at the end it is known which blobs
are read, and by whom. They then move into weight files one by one, so that the disk holds at most one of them twice.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import onnx_ir as ir

from fusionroute.fr_export.graphs.weight_store import Blob, Store
from fusionroute.runtime.manifest import File, Tensor

PAGE = 4096  # bytes. Readers map whole pages
LINE = 64  # bytes of a cache line. Norms and scales are often smaller than a page
PIECE = 1 << 22  # bytes copied at once


class WeightFiles:
    """Moves the blobs of a store into weight files. A blob goes into the first file whose graphs read it; the graphs of
    later files read it there.
    """

    def __init__(self, store: Store):
        self._store = store
        self._places: dict[str, tuple[str, int]] = {}  # a blob's hash → its file and the offset in it

    def write(self, location: str, graphs: Sequence[Path]) -> File | None:
        """Write the file `location`, a path below the graphs' folder, and let the graphs read it.

        Returns what the manifest says of it, or None for a file that would be empty and is not written.
        """
        with WeightFile(self._store.folder.parent / location) as file:
            for graph in graphs:
                model = ir.load(graph)
                for value in model.graph.initializers.values():
                    if isinstance(value.const_value, ir.ExternalTensor):
                        value.const_value = self._moved(value.const_value, file, location)
                ir.save(model, graph)
        return file.entry

    def _moved(self, tensor: ir.ExternalTensor, file: "WeightFile", location: str) -> ir.ExternalTensor:
        """The initialiser `tensor` in a weight file, to which its blob is moved if it has no place yet."""
        digest = Path(tensor.location).stem
        if digest not in self._places:
            self._places[digest] = location, file.take(self._store.blobs.pop(digest))
        place, offset = self._places[digest]
        return ir.ExternalTensor(
            place, offset, tensor.length, tensor.dtype, shape=tensor.shape, name=tensor.name, base_dir=self._store.folder.parent
        )

    def remove_unread(self) -> None:
        """Remove the blobs that no graph reads: intermediate results of a precision."""
        for blob in self._store.blobs.values():
            blob.path.unlink()
        self._store.blobs.clear()
        if not any(self._store.folder.iterdir()):
            self._store.folder.rmdir()


class WeightFile:
    """Context manager: a weight file that is being written. `entry` describes it afterwards; None if it is empty."""

    entry: File | None = None

    def __init__(self, path: Path):
        self._path, self._hash = path, hashlib.sha256()
        self._tensors: list[Tensor] = []

    def __enter__(self) -> "WeightFile":
        self._stream = self._path.open("xb")
        return self

    def take(self, blob: Blob) -> int:
        """Append a blob and remove its own file. Returns the offset in bytes."""
        end = self._stream.tell()
        offset = aligned(end, blob.length)
        self._write(bytes(offset - end))
        with blob.path.open("rb") as source:
            while piece := source.read(PIECE):
                self._write(piece)
        blob.path.unlink()
        self._tensors.append(Tensor(sha256=blob.sha256, offset=offset, bytes=blob.length))
        return offset

    def _write(self, piece: bytes) -> None:
        self._hash.update(piece)
        self._stream.write(piece)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        size = self._stream.tell()
        self._stream.close()
        if kind is not None or not self._tensors:
            self._path.unlink()
        else:
            self.entry = File(sha256=self._hash.hexdigest(), bytes=size, tensors=self._tensors)


def aligned(end: int, length: int) -> int:
    """Where a blob of `length` bytes begins behind `end`: at a page, or at a cache line if it is shorter than a page."""
    unit = PAGE if length >= PAGE else LINE
    return -(-end // unit) * unit
