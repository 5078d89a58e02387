"""A source with a whole model: which kind it is, and what a checkpoint needs of it. A new kind is one line of `KINDS`."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from fusionroute.fr_export.checkpoints.source_report import SourceReport
from fusionroute.fr_export.checkpoints.sources.gguf import GgufSource
from fusionroute.fr_export.checkpoints.sources.model_folder import ModelFolder
from fusionroute.fr_export.checkpoints.tensors import StoredTensor


class WholeSource(Protocol):
    """What is known of a source before its config is read."""

    @property
    def folder(self) -> Path:
        """Where it lies."""
        ...

    @property
    def texts(self) -> Mapping[str, Path]:
        """Its files without weights by name: config.json, tokenizer.json, …"""
        ...

    def tensors(self, config: Any, names: Iterable[str]) -> dict[str, StoredTensor]:
        """The tensors of a model by name. `config` is transformers' one of config.json, `names` what such a model has.

        Raises InputError where the files are incomplete or of a form that cannot be read.
        """
        ...

    def report(self, tensors: Mapping[str, StoredTensor]) -> SourceReport:
        """What stands in the report about the source; `tensors` are those that it gave."""
        ...


# each returns None for a path that is of another kind; the last takes every folder
KINDS: tuple[Callable[[str, Path], WholeSource | None], ...] = (GgufSource.open, ModelFolder.open)


def open_source(where: str, path: Path) -> WholeSource:
    """The source at a path. Raises InputError where it is broken."""
    return next(source for kind in KINDS if (source := kind(where, path)) is not None)
