"""GGUF, the file format of llama.cpp: which files are meant, what they say, and where their tensors lie.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fusionroute.runtime.errors import InputError, UnavailableError, one_line

PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
PROJECTOR = "mmproj"  # begins the names of files that hold a model's eyes, not its text model


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
        raise UnavailableError("Reading a GGUF file needs the package gguf: pip install gguf.") from error
    return gguf


def find(path: Path) -> Path | None:
    """The GGUF file that a path means: the file itself, or the only model in a folder; None for a folder without one.

    Of a split file it is the first part. Raises InputError for a folder with several models.
    """
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    models = [
        file
        for file in sorted(path.glob("*.gguf"))
        if not file.name.startswith(PROJECTOR) and ((part := PART.fullmatch(file.name)) is None or int(part["number"]) == 1)
    ]
    if len(models) > 1:
        raise InputError(
            f"{path} holds {len(models)} GGUF models ({', '.join(file.name for file in models)}): name one of them, such as {models[0]}."
        )
    return models[0] if models else None


def parts_of(file: Path) -> tuple[Path, ...]:
    """All parts of a split GGUF, of which `file` is any; the file alone where it is not split.

    Raises InputError where parts are missing.
    """
    part = PART.fullmatch(file.name)
    if part is None:
        return (file,)
    count = int(part["count"])
    files = tuple(file.with_name(f"{part['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1))
    if missing := [each.name for each in files if not each.is_file()]:
        raise InputError(f"{file} is one of {count} parts, and {missing[0]} is not beside it: download all parts.")
    return files


def read(file: Path) -> GgufFile:
    """Read what a GGUF file, or a split one, says of itself; no tensor's values.

    Raises UnavailableError without the package gguf, InputError for a broken or half-written file.
    """
    files = tuple(path.resolve() for path in parts_of(file))
    return _read(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files))


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
