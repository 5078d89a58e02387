"""Weights packed for this processor's kernels, in files that all processes map: one copy in memory, at full speed.

When ONNX Runtime loads a graph it packs the weights, in every process again. It can also write the graph with its
packed weights ("session.save_external_prepacked_constant_initializers") and map them when it loads that graph. This is
done once per bundle and machine, in the user's cache folder. On loading, ONNX Runtime packs again and uses the mapped
copy where both are equal: a file from another processor costs memory, but never a wrong number.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusionroute.runtime import cache, files
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.errors import UnavailableError, one_line
from fusionroute.runtime.machine import processor
from fusionroute.runtime.regular_files import Identity, identity, open_regular, read_regular

GRAPH, WEIGHTS, RECORD = "model.onnx", "weights.bin", "record"
LOG = logging.getLogger("fusionroute")
ENTRIES = {
    "session.save_external_prepacked_constant_initializers": "1",
    "session.optimized_model_external_initializers_file_name": WEIGHTS,
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
}
# disk space in multiples of the weights: a copy and the packed one; half precision is packed as fp32
ROOM = {"fp16": 5.0, "bf16": 5.0}
USUAL = 2.5


def packed(
    bundle: Bundle, graph: str, precision: str, size: int, release: str, write: Callable[[dict[str, str], Path], Any]
) -> tuple[Path, bytes]:
    """The folder of a graph with packed weights, and the graph; written at first use. `size`: of the weights, in bytes.

    `write(entries, path)` opens the original graph with these session entries and lets ONNX Runtime save it to the
    path. `release`: ONNX Runtime's version. Raises UnavailableError where it cannot be written.
    """
    try:
        folder = files.private_folder("packed") / key(bundle, graph, release)
        if not ready(folder):
            make(folder, ROOM.get(precision, USUAL) * size, write)
        return folder, read_regular(folder, GRAPH, cache.MOST_TEXT)
    except OSError as error:
        raise UnavailableError(
            f"The packed weights of {bundle.folder / graph} cannot be written to {files.cache_folder() / 'packed'} ({one_line(error)}): "
            "make room there, name another cache folder in XDG_CACHE_HOME, or load without share_weights."
        ) from error


def key(bundle: Bundle, graph: str, release: str) -> str:
    """The folder's name: a hash of the graph's name, the bundle's weights, ONNX Runtime's version and the processor."""
    read = [name for name in sorted(bundle.manifest.files) if name == graph or name.endswith(".bin")]
    stamps = [(name, bundle.manifest.files[name].sha256, (bundle.folder / name).stat().st_mtime_ns) for name in read]
    about = [graph, stamps, release, processor()]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def ready(folder: Path) -> bool:
    """Whether a folder is whole; it is then marked as used by this process, so that no other removes it."""
    with contextlib.suppress(OSError):  # there is none, or it belongs to another user
        cache.use(folder)
    return whole(folder)


def whole(folder: Path) -> bool:
    """Whether a folder holds what was written: its files are the ones that were noted, or have their hashes.

    Reading beyond the end of a mapped file kills the process.
    """
    if (noted := cache.read_checked(folder / RECORD)) is None:
        return False
    try:
        written = {name: (sha256, Identity(*file)) for name, (sha256, file) in noted.items()}
        current = {name: look(folder, name, each) for name, each in written.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        LOG.warning("The packed weights in %s are written again (%s).", folder, one_line(error))
        return False
    if {name: sha256 for name, (sha256, _) in current.items()} != {name: sha256 for name, (sha256, _) in written.items()}:
        LOG.warning("The packed weights in %s were changed: they are written again.", folder)
        return False
    if current != written:  # touched, or on another disk now
        with contextlib.suppress(OSError):
            cache.write_checked(folder / RECORD, current)
    return True


def look(folder: Path, name: str, noted: tuple[str, Identity] | None = None) -> tuple[str, Identity]:
    """A file's SHA-256, and what tells it from others; hashed unless it is the one that was noted. Raises OSError."""
    with open_regular(folder, name) as file:
        if noted is not None and identity(file) == noted[1]:
            return noted
        digest = hashlib.sha256()
        while piece := file.read(1 << 22):
            digest.update(piece)
        return digest.hexdigest(), identity(file)


def make(folder: Path, needed: float, write: Callable[[dict[str, str], Path], Any]) -> None:
    """Write a folder, which appears when it is complete; another process may have written it already.

    Raises OSError.
    """
    # packing takes the memory of a model and of its packed copy: one at a time
    with files.locked(folder.parent / "lock"):
        for left in folder.parent.glob(".*.partial"):  # left by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        if ready(folder):
            return
        cache.prune(incoming=needed)
        if (free := shutil.disk_usage(folder.parent).free) < needed:
            raise OSError(f"they need some {needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free")
        partial = folder.with_name(f".{folder.name}.partial")
        partial.mkdir(0o700)
        try:
            write(ENTRIES, partial / GRAPH)
            written = {path.name: look(partial, path.name) for path in partial.iterdir()}
            cache.write_checked(partial / RECORD, written)
            shutil.rmtree(folder, ignore_errors=True)  # an incomplete one; processes that have mapped it keep it
            cache.use(partial)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
