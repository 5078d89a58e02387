"""Weight files: the weights of one model in one file, in the order in which its graphs read them.

While graphs are written, every blob is a file of its own (`weight_store.py`): only at the end it is known which blobs
are read, and by whom. They then move into weight files one by one, so that the disk holds at most one of them twice.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx_ir as ir

from fusionroute.fr_export.graphs.weight_store import Blob, Store
from fusionroute.runtime.digests import Digest
from fusionroute.runtime.file_entry import File, Tensor
from fusionroute.runtime.files import replacing

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

    def plan(self, location: str, graphs: Sequence[Path]) -> "WeightFile":
        """The file `location`, a path below the graphs' folder, which is to be written; the graphs read it from now on."""
        file = WeightFile(self._store.folder.parent / location)
        for graph in graphs:
            model = ir.load(graph)
            for value in model.graph.initializers.values():
                if isinstance(value.const_value, ir.ExternalTensor):
                    value.const_value = self._placed(value.const_value, file, location)
            ir.save(model, graph)
        return file

    def _placed(self, tensor: ir.ExternalTensor, file: "WeightFile", location: str) -> ir.ExternalTensor:
        """The initialiser `tensor` in a weight file: the one that its blob has a place in, else `file`."""
        digest = Path(tensor.location).stem
        if digest not in self._places:
            self._places[digest] = location, file.add(self._store.blobs.pop(digest))
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
    """A file of blobs at fixed offsets."""

    def __init__(self, path: Path):
        self._path, self._size = path, 0
        self._blobs: list[tuple[int, Blob]] = []  # offset and blob

    def add(self, blob: Blob) -> int:
        """Append a blob. Returns the offset in bytes."""
        offset = aligned(self._size, blob.length)
        self._blobs.append((offset, blob))
        self._size = offset + blob.length
        return offset

    def write(self) -> File | None:
        """Move the blobs into the file, one after the other. Returns what the manifest says of it, or None for a file
        that would be empty and is not written.
        """
        if not self._blobs:
            return None
        digest = Digest()
        with replacing(self._path) as partial, partial.open("xb") as stream:
            for offset, blob in self._blobs:
                for piece in (bytes(offset - stream.tell()), *pieces(blob.path)):
                    digest.update(piece)
                    stream.write(piece)
                blob.path.unlink()
        tensors = [Tensor(sha256=blob.sha256, offset=offset, bytes=blob.length) for offset, blob in self._blobs]
        return File.of(digest, tensors)


def pieces(path: Path) -> Iterator[bytes]:
    """The content of a file, piece by piece."""
    with path.open("rb") as source:
        while piece := source.read(PIECE):
            yield piece


def aligned(end: int, length: int) -> int:
    """Where a blob of `length` bytes begins behind `end`: at a page, or at a cache line if it is shorter than a page."""
    unit = PAGE if length >= PAGE else LINE
    return -(-end // unit) * unit
