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
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusionroute.runtime import cache, files
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.errors import UnavailableError, one_line
from fusionroute.runtime.machine import processor

GRAPH, WEIGHTS, SIZES = "model.onnx", "weights.bin", "sizes.json"
ENTRIES = {
    "session.save_external_prepacked_constant_initializers": "1",
    "session.optimized_model_external_initializers_file_name": WEIGHTS,
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
}
# disk space in multiples of the weights: a copy and the packed one; half precision is packed as fp32
ROOM = {"fp16": 5.0, "bf16": 5.0}
USUAL = 2.5


def packed(bundle: Bundle, graph: str, precision: str, size: int, release: str, write: Callable[[dict[str, str], Path], Any]) -> Path:
    """The path of a graph with packed weights, which are written at first use. `size`: of the weights, in bytes.

    `write(entries, path)` opens the original graph with these session entries and lets ONNX Runtime save it to the
    path. `release`: ONNX Runtime's version. Raises UnavailableError where it cannot be written.
    """
    folder = files.cache_folder() / "packed" / key(bundle, graph, release)
    if not ready(folder):
        try:
            make(folder, ROOM.get(precision, USUAL) * size, write)
        except OSError as error:
            raise UnavailableError(
                f"The packed weights of {bundle.folder / graph} cannot be written to {folder.parent} ({one_line(error)}): "
                "make room there, name another cache folder in XDG_CACHE_HOME, or load without share_weights."
            ) from error
    return folder / GRAPH


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
    """Whether a folder holds all that was written: reading beyond the end of a mapped file kills the process."""
    try:
        sizes: dict[str, int] = json.loads((folder / SIZES).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


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
            raise OSError(f"they need some {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
        partial = folder.with_name(f".{folder.name}.partial")
        partial.mkdir()
        try:
            write(ENTRIES, partial / GRAPH)
            sizes = {path.name: path.stat().st_size for path in partial.iterdir()}
            (partial / SIZES).write_text(json.dumps(sizes))
            shutil.rmtree(folder, ignore_errors=True)  # an incomplete one; processes that have mapped it keep it
            cache.use(partial)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
