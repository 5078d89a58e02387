"""A Hugging Face model folder as a source: safetensors, quantised or not, and text files."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fusionroute.fr_export.checkpoints.chat_template_files import FOLDER as TEMPLATES
from fusionroute.fr_export.checkpoints.json_file import read_json
from fusionroute.fr_export.checkpoints.source_report import SourceReport
from fusionroute.fr_export.checkpoints.sources.quantised import dequantised, method_of, note
from fusionroute.fr_export.checkpoints.sources.slow_tokenizer import OLDER, converted_tokenizer
from fusionroute.fr_export.checkpoints.sources.text_part import text_part
from fusionroute.fr_export.checkpoints.tensors import StoredTensor
from fusionroute.fr_export.checkpoints.weights import Weights


@dataclass(frozen=True)
class ModelFolder:
    """See `WholeSource`."""

    where: str
    folder: Path
    texts: Mapping[str, Path]
    quantisation: Mapping[str, Any]  # of config.json; empty for a model in floating point

    @classmethod
    def open(cls, where: str, path: Path) -> "ModelFolder":
        """Read what the texts of a folder say.

        Raises InputError without a config.json, and for a method of quantisation that is not read here.
        """
        config = read_json(path / "config.json", f"{where} is not a Hugging Face model folder")
        quantisation = config.get("quantization_config") or {}
        if quantisation:
            method_of(where, quantisation)
        texts = texts_in(path)
        if "tokenizer.json" not in texts and (older := next((name for name in OLDER if name in texts), None)):
            texts["tokenizer.json"] = converted_tokenizer(where, path, older)
        return cls(where, path, texts, quantisation)

    @cached_property
    def stored(self) -> tuple[Mapping[str, StoredTensor], tuple[str, ...]]:
        """The tensors of the language model as they are stored, and what to say of those that are left out."""
        return text_part(Weights.open(self.folder).entries)

    def tensors(self, config: Any, names: Iterable[str]) -> dict[str, StoredTensor]:
        """See `WholeSource.tensors`."""
        stored, _ = self.stored
        return dequantised(self.where, self.quantisation, stored) if self.quantisation else dict(stored)

    def report(self, tensors: Mapping[str, StoredTensor]) -> SourceReport:
        """See `WholeSource.report`."""
        stored, left_out = self.stored
        notes = [*left_out, *([note(self.quantisation, tensors)] if self.quantisation else [])]
        tokenizer = self.texts.get("tokenizer.json")
        if tokenizer is not None and tokenizer.parent != self.folder:
            notes.append(f"tokenizer.json converted from {next(name for name in OLDER if name in self.texts)}")
        return SourceReport.of("full", stored.values(), tuple(notes))


def texts_in(folder: Path) -> dict[str, Path]:
    """The files in a folder by name, without weights; and the chat templates in the folder that transformers keeps them in."""
    files = {
        file.name: file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix in (".json", ".jinja", ".model", ".txt")
    }
    return files | {f"{TEMPLATES}/{file.name}": file for file in sorted((folder / TEMPLATES).glob("*.jinja")) if file.is_file()}
