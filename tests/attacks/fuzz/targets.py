"""What each parser may do with any bytes at all: take them, or refuse them with the error that it promises."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from fusionroute.runtime import graph_file, graph_tensors, tokenizer_limits
from fusionroute.runtime.adapters.lora_config import LoraConfig
from fusionroute.runtime.adapters.unadapted import Unadapted, read_layout
from fusionroute.runtime.archive import members, padded, read_manifest, read_signature_member
from fusionroute.runtime.errors import BundleError, InputError
from fusionroute.runtime.manifest import Manifest
from fusionroute.runtime.strict_json import check_json
from fusionroute.runtime.tensor_file import TensorFile

MOST_MEMBERS = 1000  # of an archive that are read


def strict_json(content: bytes) -> None:
    """What is taken says each thing once: it is the same, written and read again."""
    try:
        check_json(content)
    except ValueError:
        return
    value = json.loads(content)
    assert json.loads(json.dumps(value)) == value


def manifest(content: bytes) -> None:
    """A refusal is one line; what is taken stays as it is when it is written."""
    try:
        read = Manifest.parse(content, "it")
    except BundleError as error:
        assert str(error).isprintable()
        return
    assert Manifest.parse(read.model_dump_json(), "it") == read


def graph(content: bytes) -> None:
    """Its weights' files, its tensors, and its positions."""
    with suppress(ValueError):
        assert all(isinstance(name, str) for name in graph_file.external_files(content))
    with suppress(ValueError):
        assert all(tensor.bytes >= 0 for tensor in graph_tensors.tensors(content))
    with suppress(ValueError):
        graph_tensors.positions(content)


def tensor_file(content: bytes) -> None:
    """Tensors lie in the file, and have the values that their shapes say."""
    with mapped(content) as file:
        try:
            read = TensorFile(file)
        except (OSError, ValueError):
            return
        for tensor in read.tensors.values():
            assert tensor.stored().nbytes <= len(content) and tensor.values().shape == tensor.shape


def factors(content: bytes) -> None:
    """What a bundle keeps so that adapters can be added."""
    with mapped(content) as file, suppress(BundleError):
        read_layout(file)
    with mapped(content) as file, suppress(BundleError):
        Unadapted.read(file)


def tokenizer(content: bytes) -> None:
    """A reason, or none."""
    reason = tokenizer_limits.unbounded(content)
    assert reason is None or (reason and "\n" not in reason)


def archive(content: bytes) -> None:
    """Headers, one by one; nothing is written."""
    stream = BytesIO(content)
    with suppress(BundleError):
        read_manifest(stream, Path("it"))
        read_signature_member(stream, Path("it"))
        for _, (_, size) in zip(range(MOST_MEMBERS), members(stream, Path("it")), strict=False):
            stream.seek(padded(size), os.SEEK_CUR)


def lora_config(content: bytes) -> None:
    """An adapter's configuration."""
    with folder_with("adapter_config.json", content) as folder, suppress(InputError):
        LoraConfig.read(folder, "it")


TARGETS: dict[str, Callable[[bytes], None]] = {
    each.__name__: each for each in (strict_json, manifest, graph, tensor_file, factors, tokenizer, archive, lora_config)
}


@contextmanager
def mapped(content: bytes) -> Iterator[BinaryIO]:
    """A file in memory."""
    with os.fdopen(os.memfd_create("fuzz"), "w+b") as file:
        file.write(content)
        file.flush()
        file.seek(0)
        yield file


@contextmanager
def folder_with(name: str, content: bytes) -> Iterator[Path]:
    """A folder that holds one file; the same each time."""
    folder = Path(f"/dev/shm/fusionroute-fuzz-{os.getpid()}")
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    yield folder
