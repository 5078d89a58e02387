"""Rounded matrices that an export has finished, kept in the cache folder until it succeeds.

A rerun with the same inputs takes them over instead of rounding them again, wherever the first run was ended. They are
named by everything that they depend on. What is taken over is hashed while it is copied, so a broken file is only made
again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.weight_store import Blob, Store
from fusionroute.fr_export.precision.blockwise import Format, Stored
from fusionroute.runtime import __version__, cache, files

KIND = "rounded"
VERSION = 2  # of how matrices are rounded: raising it lets go of all that was kept
PIECE = 1 << 22  # bytes copied at once
PACKAGES = ("torch", "transformers", "numpy", "numba", "onnx-ir", "onnxscript")  # other releases may round otherwise


class KeptMatrices:
    """What the exports of this user have kept. `reserve`: bytes that stay free on the disk of the cache folder, such as
    those that the export needs itself.

    Where nothing can be written, nothing is kept. Threads may keep and take over at once.
    """

    def __init__(self, reserve: int = 0):
        self.reserve = reserve
        self._used: set[Path] = set()
        self._lock = threading.Lock()

    def of(self, about: Mapping[str, Any]) -> KeptModel:
        """What was kept of one model in one precision; `about` is all that its rounded matrices depend on."""
        packages = {package: version(package) for package in PACKAGES}
        everything = {"version": VERSION, "fusionroute": __version__, **packages, **about}
        identity = hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()
        with self._lock:
            folder = None
            with contextlib.suppress(OSError):
                folder = files.private_folder(KIND) / identity
                if not folder.exists():
                    cache.prune()
                folder.mkdir(exist_ok=True)
                cache.use(folder)
                self._used.add(folder)
        return KeptModel(folder, self.reserve)

    def remove(self) -> None:
        """Remove what this export has kept and taken over: it has succeeded."""
        for folder in self._used:
            shutil.rmtree(folder, ignore_errors=True)


class KeptModel:
    """The kept matrices of one model in one precision: a record per matrix, and its blobs, named by their SHA-256."""

    def __init__(self, folder: Path | None, reserve: int):
        self._folder, self._reserve = folder, reserve

    def take(self, key: str, fmt: Format, store: Store, name: str) -> Stored | None:
        """The matrix that was kept under a key, copied into the store. None where it is missing, or is another: logged."""
        record = None if self._folder is None else cache.read_checked(self._folder / f"{named(key)}.json")
        if self._folder is None or record is None:
            return None
        try:
            blobs = [copied(self._folder / f"{sha256}.bin", sha256, store, name) for sha256 in record]
        except (OSError, ValueError, TypeError) as error:
            files.LOG.warning("The matrix %s of an earlier export is rounded again (%s).", name, error)
            return None
        return Stored(fmt, blobs[0], blobs[1], blobs[2] if fmt.zeros else None)

    def keep(self, key: str, stored: Stored) -> None:
        """Keep a matrix of the store under a key. Raises nothing."""
        if self._folder is None:
            return
        blobs = [blob for blob in (stored.values, stored.scales, stored.zeros) if blob is not None]
        with contextlib.suppress(OSError):
            if shutil.disk_usage(self._folder).free < self._reserve + sum(blob.length for blob in blobs):
                return
            for blob in blobs:
                link(blob, self._folder)
            cache.write_checked(self._folder / f"{named(key)}.json", [blob.sha256 for blob in blobs])


def named(key: str) -> str:
    """A file name for a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def link(blob: Blob, folder: Path) -> None:
    """Let a blob stand in a folder too: a link of its file, which nobody writes to again, or a copy. Raises OSError."""
    target = folder / blob.path.name
    if target.exists():
        return
    with files.replacing(target) as partial:
        try:
            os.link(blob.path, partial)
        except OSError:  # another disk
            shutil.copyfile(blob.path, partial)


def copied(path: Path, sha256: str, store: Store, name: str) -> Blob:
    """A kept blob in the store. Raises OSError, and ValueError where it is not the one that was kept."""
    with path.open("rb") as source, store.writer(name) as writer:
        while piece := source.read(PIECE):
            writer.write(np.frombuffer(piece, np.uint8))
        if writer.hash.hexdigest() != sha256:
            raise ValueError("it is not what was kept")
    return writer.blob


def stamps(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """What identifies files without reading them: path, size and time of change."""
    resolved = sorted(path.resolve() for path in paths)
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in resolved]


def graph_digest(graph: Graph) -> str:
    """Of a traced graph without its weights: another trace is rounded otherwise."""
    digest = hashlib.sha256()
    for node in graph.model.graph:
        names = [[None if value is None else value.name for value in values] for values in (node.inputs, node.outputs)]
        attributes = [(name, content(attribute)) for name, attribute in sorted(node.attributes.items())]
        digest.update(repr((node.domain, node.op_type, names, attributes)).encode())
    for name, source in sorted(graph.sources.items()):
        digest.update(repr((name, source.tensors, source.rows)).encode())
        digest.update(b"" if source.constant is None else np.ascontiguousarray(source.constant).data)
    return digest.hexdigest()


def content(attribute: ir.Attr) -> str:
    """What tells an attribute of an operator from others."""
    value = attribute.value
    return hashlib.sha256(value.numpy().tobytes()).hexdigest() if isinstance(value, ir.TensorProtocol) else str(value)
