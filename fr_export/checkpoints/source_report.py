"""What a checkpoint was made from, for the report of an export."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from fusionroute.fr_export.checkpoints.tensors import StoredTensor


@dataclass(frozen=True)
class SourceReport:
    """One source. `kind`: full, adapter or gguf. `bytes`: its own files on disk, without an adapter's base.

    `dtypes`: those of its tensors, as safetensors names them, sorted. `notes`: what was done to it, a sentence each.
    """

    kind: str
    bytes: int
    dtypes: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, kind: str, tensors: Iterable[StoredTensor], notes: tuple[str, ...] = ()) -> "SourceReport":
        """The report of a source with these tensors."""
        tensors = list(tensors)
        files: set[Path] = {file for tensor in tensors for file in tensor.files}
        return cls(kind, sum(file.stat().st_size for file in files), tuple(sorted({tensor.dtype for tensor in tensors})), notes)

    def beside(self, tensors: Iterable[StoredTensor]) -> "SourceReport":
        """This report with tensors of further files, such as a routing head."""
        more = SourceReport.of(self.kind, tensors)
        return replace(self, bytes=self.bytes + more.bytes, dtypes=tuple(sorted({*self.dtypes, *more.dtypes})))
