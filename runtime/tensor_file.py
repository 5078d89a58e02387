"""Safetensors files, mapped and written with numpy alone: https://huggingface.co/docs/safetensors/index#format."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from fusionroute.runtime.digests import Digest
from fusionroute.runtime.files import partial_name

PREFIX = 8  # bytes that tell how long the header is
LINE = 64  # bytes of a cache line: values begin at a multiple, so that tensors do where their sizes allow it
METADATA = "__metadata__"
WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}  # bytes of a value
TYPES: dict[str, type[np.generic]] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}  # numpy has no bf16


def narrowed(values: np.ndarray, dtype: str) -> np.ndarray:
    """Float32 values rounded to a dtype, as arrays that `write_tensors` takes: of BF16 the bits, uint16."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)  # the nearest, of two the even one
    with np.errstate(over="ignore"):
        return values.astype(TYPES[dtype], copy=False)


def widened(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Float32 values of an array that `narrowed` returns; of F32 the array itself."""
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32, copy=False)


class Stored(NamedTuple):
    """One tensor: the dtype as safetensors names it, its shape, and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray

    def stored(self) -> np.ndarray:
        """The mapped values as they are, read-only; of BF16 their bits, uint16."""
        return self.data.view(TYPES[self.dtype]).reshape(self.shape)

    def values(self) -> np.ndarray:
        """Float32 values: of F32 the mapped ones, read-only; of the others a copy."""
        return widened(self.stored(), self.dtype)


class TensorFile:
    """A mapped file: its pages are read when they are used, and processes share their memory.

    `tensors`: name → tensor, in the order of the header. `metadata`: texts by name.
    """

    def __init__(self, file: Path | BinaryIO):
        """`file` may be closed afterwards. Raises OSError, and ValueError for one that is not of floating-point tensors."""
        data = np.memmap(file, np.uint8, "r")
        start = PREFIX + int.from_bytes(data[:PREFIX].tobytes(), "little")
        try:
            entries = json.loads(data[PREFIX:start].tobytes())
            self.metadata: dict[str, str] = dict(entries.pop(METADATA, {}))
            self.tensors = {name: stored(data, start, **entry) for name, entry in entries.items()}
        except (TypeError, AttributeError, RecursionError) as error:
            raise ValueError(str(error)) from error


def stored(data: np.ndarray, start: int, dtype: str, shape: list[int], data_offsets: list[int]) -> Stored:
    """One tensor of a file whose tensors begin at byte `start`. Raises ValueError, TypeError."""
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in (*shape, *data_offsets)):  # lists and texts multiply too
        raise ValueError("a shape or an offset is no size")
    first, end = (start + offset for offset in data_offsets)
    width = WIDTHS.get(dtype, 0)
    if not width or end - first != width * math.prod(shape) or not start <= first <= end <= len(data) or first % width:
        raise ValueError(f"{dtype} {shape} at bytes {first} to {end} of {len(data)}")
    return Stored(dtype, tuple(shape), data[first:end])


def header(entries: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str]) -> bytes:
    """How a file begins: its tensors' dtypes as safetensors names them, their shapes and bytes, in their order."""
    end, fields = 0, dict[str, object]({METADATA: dict(metadata)} if metadata else {})
    for name, (dtype, shape, size) in entries.items():
        start, end = end, end + size
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-(PREFIX + len(text)) % LINE)
    return len(text).to_bytes(PREFIX, "little") + text


class Written(NamedTuple):
    """A file that was written, and the digest of its content."""

    path: Path
    digest: Digest


def write_tensors(
    folder: Path, stem: str, entries: Mapping[str, tuple[str, tuple[int, ...]]], arrays: Iterable[np.ndarray], metadata: Mapping[str, str]
) -> Written:
    """Write a file STEM-HASH.safetensors, named by its content, which appears when it is complete.

    entries: name → dtype as safetensors names it, and shape. arrays: in this order, of items as wide as their dtype.
    """
    sizes = {name: (dtype, shape, WIDTHS[dtype] * math.prod(shape)) for name, (dtype, shape) in entries.items()}
    folder.mkdir(parents=True, exist_ok=True)
    partial, digest = partial_name(folder / f"{stem}.safetensors"), Digest()
    try:
        with partial.open("wb") as file:
            beginning = header(sizes, metadata)
            digest.update(beginning)
            file.write(beginning)
            for array, (dtype, shape) in zip(arrays, entries.values(), strict=True):
                assert array.shape == shape and array.itemsize == WIDTHS[dtype]
                data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
                digest.update(data)
                file.write(data)
        named = partial.replace(folder / f"{stem}-{digest.hexdigests['sha256'][:8]}.safetensors")
    finally:
        partial.unlink(missing_ok=True)
    return Written(named, digest)
