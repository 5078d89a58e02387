"""Where the weights of exported graphs lie, read from the graphs."""

from pathlib import Path
from typing import NamedTuple

import onnx_ir as ir


class StoredWeight(NamedTuple):
    """A byte range of a file."""

    file: Path
    offset: int
    length: int

    def read(self) -> bytes:
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            return stream.read(self.length)


def stored_weights(graph: Path) -> dict[str, StoredWeight]:
    """Initialiser → its bytes, for those that stand outside of the graph."""
    return {
        name: StoredWeight(graph.parent / tensor.location, tensor.offset or 0, tensor.length or 0)
        for name, value in ir.load(graph).graph.initializers.items()
        if isinstance(tensor := value.const_value, ir.ExternalTensor)
    }
