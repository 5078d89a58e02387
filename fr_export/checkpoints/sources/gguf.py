"""A GGUF file as a source: texts converted from its keys, tensors dequantised while they are read."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusionroute.fr_export.checkpoints.source_report import SourceReport
from fusionroute.fr_export.checkpoints.sources.gguf_file import GgufFile, find, read
from fusionroute.fr_export.checkpoints.sources.gguf_tensors import PLAIN, GgufTensor, tensors
from fusionroute.fr_export.checkpoints.sources.gguf_texts import CONVERTED, texts_of
from fusionroute.fr_export.checkpoints.tensors import StoredTensor


@dataclass(frozen=True)
class GgufSource:
    """An open GGUF. See `WholeSource`."""

    where: str
    gguf_file: GgufFile
    texts: Mapping[str, Path]

    @classmethod
    def open(cls, where: str, path: Path) -> "GgufSource | None":
        """The GGUF at a path, or the only one in a folder without a model in safetensors; None where there is none.

        Raises InputError for several in a folder, for a broken one, and for what cannot be converted.
        """
        if path.is_dir() and any(path.glob("model*.safetensors*")):
            return None
        file = find(path)
        if file is None:
            return None
        gguf_file = read(file)
        return cls(where, gguf_file, texts_of(where, gguf_file))

    @property
    def folder(self) -> Path:
        """The folder of the file."""
        return self.gguf_file.files[0].parent

    def tensors(self, config: Any, names: Iterable[str]) -> dict[str, StoredTensor]:
        """See `WholeSource.tensors`."""
        return dict(tensors(self.where, self.gguf_file, names, config))

    def report(self, tensors: Mapping[str, StoredTensor]) -> SourceReport:
        """See `WholeSource.report`."""
        stored = [tensor.part for tensor in tensors.values() if isinstance(tensor, GgufTensor)]
        types = Counter(part.type_name for part in stored)
        made = [name for name in CONVERTED if (file := self.texts.get(name)) is not None and file.parent != self.folder]
        notes = []
        if quantised := [f"{count} {name}" for name, count in types.most_common() if name not in PLAIN]:
            notes.append(f"it was quantised already ({', '.join(quantised)} tensors) and is dequantised to fp32 while it is read")
        if made:
            notes.append(f"{', '.join(made)} converted from its keys")
        return SourceReport("gguf", sum(file.stat().st_size for file in self.gguf_file.files), tuple(sorted(types)), tuple(notes))
