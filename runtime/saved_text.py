"""A text with its keys and values in a file, so that it is read once, and not at every start.

A safetensors file: the tokens, for each model that has read some of them what it keeps of them, and at the end the
SHA-256 of all bytes before. Its metadata say which bundle and variant it belongs to.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from fusionroute.runtime.decoder import Decoder
from fusionroute.runtime.errors import InputError, UnavailableError, reason
from fusionroute.runtime.files import replacing
from fusionroute.runtime.loaded_system import LoadedSystem
from fusionroute.runtime.reader import Reader
from fusionroute.runtime.regular_files import open_regular
from fusionroute.runtime.tensor_file import METADATA, PREFIX, header

if TYPE_CHECKING:
    from fusionroute.runtime.manifest import Model

FORMAT = "fusionroute text 1"
MOST_HEADER = 1 << 20  # bytes: some hundred for each model
DTYPES = {32: ("F32", 4), 8: ("I8", 1), 4: ("U8", 1)}  # bits of a value → dtype, and its bytes; two values of 4 bits in one
IDS, HASH, KEYS_VALUES = "token_ids", "sha256", "keys_values."


class Extent(NamedTuple):
    """What a file holds: how many tokens, how many of them were the prompt, where the answer begins, and how many of them
    each model has read, in the order of the manifest; models that have read none are left out.
    """

    tokens: int
    prompt: int
    answer: int
    lengths: dict[str, int]


class Layout:
    """How texts of a system lie in files. Raises UnavailableError for a system that keeps them on a device."""

    def __init__(self, system: LoadedSystem):
        if not system.backend.on_host:
            raise UnavailableError("Texts are saved from the host's memory alone, and this device keeps its own: use device='cpu'.")
        self.system, self.manifest, self.variant = system, system.bundle.manifest, system.variant
        self.origin = {
            "format": FORMAT, "bundle": system.bundle.sha256, "target": self.variant.target, "precision": self.variant.precision,
            "kv": self.variant.kv or "fp32", "exact": str(system.exact),
        }  # fmt: skip

    def readers(self, decoder: Decoder) -> dict[str, Reader]:
        """Those of a text that read with models of the bundle."""
        named = zip(self.system.expert_names, decoder.readers.experts, strict=True)
        return {self.system.router_name: decoder.readers.router} | {
            name: reader for name, reader in named if name not in self.system.exchanged
        }

    def header(self, extent: Extent) -> bytes:
        """The beginning of a file."""
        entries: dict[str, tuple[str, tuple[int, ...], int]] = {IDS: ("I32", (extent.tokens,), 4 * extent.tokens)}
        for model in self.manifest.models:
            if length := extent.lengths.get(model.name, 0):
                (dtype, size), shape = DTYPES[self.variant.kv_bits], self.shape(model, length)
                entries[KEYS_VALUES + model.name] = dtype, shape, size * int(np.prod(shape))
        entries[HASH] = "U8", (hashlib.sha256().digest_size,), hashlib.sha256().digest_size
        return header(entries, {**self.origin, "prompt": str(extent.prompt), "answer": str(extent.answer)})

    def shape(self, model: Model, length: int) -> tuple[int, int, int, int]:
        """Of a model's keys and values."""
        return 2 * model.layers, model.kv_heads, length, model.head_size // (2 if self.variant.kv_bits == 4 else 1)

    def size(self, extent: Extent) -> int:
        """Bytes of a whole file."""
        values = sum(self.variant.kv_bytes_per_token(model) * extent.lengths.get(model.name, 0) for model in self.manifest.models)
        return len(self.header(extent)) + 4 * extent.tokens + values + hashlib.sha256().digest_size

    def extent(self, text: bytes) -> Extent:
        """What a header says, which is the one that `header` makes of it. Raises ValueError for any other."""
        try:
            entries = json.loads(text)
            metadata = entries[METADATA]
            lengths = {
                model.name: entries.get(KEYS_VALUES + model.name, {"shape": [0, 0, 0]})["shape"][2] for model in self.manifest.models
            }
            extent = Extent(
                entries[IDS]["shape"][0], int(metadata["prompt"]), int(metadata["answer"]), {k: v for k, v in lengths.items() if v}
            )
        except (TypeError, AttributeError, LookupError, RecursionError) as error:
            raise ValueError(str(error)) from error
        numbers = (extent.tokens, *extent.lengths.values())
        if not all(type(number) is int and 0 <= number <= self.manifest.max_seq_len for number in numbers):
            raise ValueError("a length is none")
        within = 0 <= extent.prompt <= extent.tokens and 0 <= extent.answer <= extent.tokens
        if not within or max(numbers) > extent.tokens or self.header(extent)[PREFIX:] != text:
            raise ValueError("it is written otherwise")
        return extent

    def foreign(self, text: bytes) -> str | None:
        """In what a header is that of another system; None: it is of this one, or of no text."""
        try:
            metadata = json.loads(text)[METADATA]
            theirs = {name: str(metadata[name]) for name in self.origin}
        except (TypeError, LookupError, ValueError, RecursionError):
            return None
        wrong = next((name for name, own in self.origin.items() if theirs[name] != own), None)
        if wrong is None or theirs["format"] != FORMAT:
            return None
        if wrong == "bundle":
            return "another bundle"
        return f"{wrong} {theirs[wrong][:20]}, and this runtime has {self.origin[wrong]}"


def save(decoder: Decoder, path: Path) -> None:
    """Write a text, in place of an older file in one step. Raises InputError where it cannot be written, UnavailableError."""
    layout, sequence = Layout(decoder.system), decoder.sequence
    decoder.readers.settle()
    readers = {name: reader for name, reader in layout.readers(decoder).items() if reader.length}
    extent = Extent(
        len(sequence.ids), sequence.prompt_length, sequence.answer_start, {name: reader.length for name, reader in readers.items()}
    )
    try:
        check_name(path)
        with replacing(path) as partial, partial.open("wb") as file:
            digest = hashlib.sha256()
            arrays: Iterator[np.ndarray] = chain((np.array(sequence.ids, np.int32),), strips(layout, extent, readers))
            for piece in chain((memoryview(layout.header(extent)),), map(raw, arrays)):
                digest.update(piece)
                file.write(piece)
            file.write(digest.digest())
    except OSError as error:
        raise InputError(f"{path} cannot be written ({reason(error)}): name another file.") from error


def load(decoder: Decoder, path: Path) -> None:
    """Take a saved text over, with what models have read of it, into a decoder that holds none.

    Raises InputError for a file that `save` has not written, that was damaged, and of another system; UnavailableError.
    Then the decoder is of no use.
    """
    layout = Layout(decoder.system)
    try:
        check_name(path)
        with open_regular(path.parent, path.name) as file:
            size = os.fstat(file.fileno()).st_size
            prefix = whole(file, memoryview(bytearray(PREFIX)))
            length = int.from_bytes(prefix, "little")
            text = bytes(whole(file, memoryview(bytearray(min(length, MOST_HEADER)))))
            if (other := layout.foreign(text)) is not None:
                raise InputError(f"{path} was saved with {other}: load it there, or read its text again.")
            extent = layout.extent(text)
            if size != layout.size(extent):
                raise ValueError("it has another size")
            digest = hashlib.sha256(bytes(prefix) + text)
            _fill(decoder, layout, extent, file, digest)
            if whole(file, memoryview(bytearray(digest.digest_size))) != digest.digest():
                raise ValueError("its SHA-256 is another")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({reason(error)}): name a file that a session has saved.") from error
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path} holds no saved text, or was damaged: name a file that a session has saved, whole.") from error
    decoder.readers.start_lending()


def _fill(decoder: Decoder, layout: Layout, extent: Extent, file: BinaryIO, digest: Any) -> None:
    """Read tokens, keys and values. Raises ValueError for tokens that are none, OSError."""
    ids = np.empty(extent.tokens, np.int32)
    digest.update(whole(file, raw(ids)))
    if not ((ids >= 0) & (ids < layout.manifest.vocab_size)).all():
        raise ValueError("a token is outside the vocabulary")
    sequence, readers = decoder.sequence, layout.readers(decoder)
    sequence.append(ids.tolist())
    sequence.prompt_length, sequence.answer_start = extent.prompt, extent.answer
    for strip in strips(layout, extent, readers):
        digest.update(whole(file, raw(strip)))
    for name in extent.lengths:
        if name in readers:
            readers[name].cache.length = extent.lengths[name]


def strips(layout: Layout, extent: Extent, readers: dict[str, Reader]) -> Iterator[np.ndarray]:
    """The arrays that hold keys and values, head by head, in the order of a file; of models without a reader one that is
    used again.
    """
    for model in layout.manifest.models:
        if length := extent.lengths.get(model.name, 0):
            if model.name in readers:
                for layer in readers[model.name].keys_values(length):
                    yield from layer
            else:
                layers, heads, *head = layout.shape(model, length)
                yield from repeat(np.empty(head, f"u{DTYPES[layout.variant.kv_bits][1]}"), layers * heads)


def check_name(path: Path) -> None:
    """Raise OSError for a path that names no file, such as the current folder."""
    if not path.name:
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))


def raw(array: np.ndarray) -> memoryview:
    """The bytes of a contiguous array."""
    return array.reshape(-1).view(np.uint8).data


def whole(file: BinaryIO, buffer: memoryview) -> memoryview:
    """Fill a buffer. Raises ValueError at a file's end, OSError."""
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])  # type: ignore[attr-defined]
        if not count:
            raise ValueError("it ends early")
        done += count
    return buffer
