"""GGUF, the file format of llama.cpp: which files are meant, what they say, and where their tensors lie.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fusionroute.fr_export.checkpoints.gguf_names import models_among, parts_of
from fusionroute.runtime.errors import InputError, UnavailableError, one_line


@dataclass(frozen=True)
class GgufPart:
    """A tensor in a GGUF file: where its bytes lie, their ggml type (as its number and its name), and its shape."""

    file: Path
    start: int
    type: int
    type_name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class GgufFile:
    """An open GGUF: one file, or the parts of a split one in order. `fields` are those of the first file."""

    files: tuple[Path, ...]
    fields: dict[str, Any]  # gguf's ReaderField by key
    parts: dict[str, GgufPart]

    def __contains__(self, key: str) -> bool:
        return key in self.fields

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key as Python has it: a number, a bool, a text, or a list of these."""
        return self.fields[key].contents() if key in self.fields else default

    @property
    def architecture(self) -> str:
        """As llama.cpp names it: llama, gemma2, qwen2, …"""
        return str(self.get("general.architecture"))


def library() -> Any:
    """The package gguf, which reads and dequantises these files. Raises UnavailableError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise UnavailableError("Reading a GGUF file needs the package gguf, which the extra 'gguf' brings: pip install gguf.") from error
    return gguf


def find(path: Path) -> Path | None:
    """The GGUF file that a path means: the file itself, or the only model in a folder; None for a folder without one.

    Of a split file it is the first part. Raises InputError for a folder with several models.
    """
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    models = models_among(path.iterdir())
    if len(models) > 1:
        raise InputError(
            f"{path} holds {len(models)} GGUF models ({', '.join(file.name for file in models)}): name one of them, such as {models[0]}."
        )
    return models[0] if models else None


def read(file: Path) -> GgufFile:
    """Read what a GGUF file, or a split one, says of itself; no tensor's values.

    Raises UnavailableError without the package gguf, InputError for a broken or half-written file.
    """
    files = parts_of(file)
    if missing := [each.name for each in files if not each.is_file()]:
        raise InputError(f"{file} is one of {len(files)} parts, and {missing[0]} is not beside it: download all parts.")
    return _read(tuple((path.absolute(), path.stat().st_size, path.stat().st_mtime_ns) for path in files))


@lru_cache(maxsize=8)
def _read(stamped: tuple[tuple[Path, int, int], ...]) -> GgufFile:
    """`read`, which takes seconds for a large vocabulary; the sizes and times tell when a file has changed."""
    reader_type = reader_class()
    fields: dict[str, Any] = {}
    parts: dict[str, GgufPart] = {}
    for file, size, _ in stamped:
        try:
            reader = reader_type(file)
        except Exception as error:  # it raises many kinds for a broken file
            raise InputError(f"{file} is not a complete GGUF file ({one_line(error)}): download it again.") from error
        fields = fields or dict(reader.fields)
        for tensor in reader.tensors:
            shape = tuple(int(length) for length in reversed(tensor.shape))  # ggml names the fastest axis first
            parts[tensor.name] = GgufPart(file, int(tensor.data_offset), int(tensor.tensor_type), tensor.tensor_type.name, shape)
            if tensor.data_offset + tensor.n_bytes > size:
                raise InputError(f"{file} is not a complete GGUF file (it ends within {tensor.name}): download it again.")
    opened = GgufFile(tuple(file for file, *_ in stamped), fields, parts)
    if "general.architecture" not in opened:
        raise InputError(f"{stamped[0][0]} does not say which architecture it is; expected general.architecture: convert the model again.")
    return opened


def reader_class() -> Any:
    """gguf's reader, over a plain array: numpy's memmap makes each of its many slices three times as slow."""

    class Reader(library().GGUFReader):  # type: ignore[misc]
        @property
        def data(self) -> Any:
            return self._bytes

        @data.setter
        def data(self, mapped: Any) -> None:
            self._bytes = mapped.view(np.ndarray)

    return Reader
