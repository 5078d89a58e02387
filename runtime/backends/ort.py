"""What the backends on ONNX Runtime share: the package, sessions, and the check of graphs against the manifest."""

from __future__ import annotations

import ctypes
import os
import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from fusionroute.runtime.backends.signature import FLOATS, ORT_LENGTHS, CacheValue, Signature, Values, of_model
from fusionroute.runtime.errors import BundleError, FusionError, UnavailableError, one_line
from fusionroute.runtime.graph_tensors import positions
from fusionroute.runtime.machine import sums_in_32_bits

if TYPE_CHECKING:
    from fusionroute.runtime.bundle import Bundle


OLDEST = (1, 23)  # release of ONNX Runtime
# what it says where memory does not suffice, and where it does not know what a newer exporter wrote
NO_MEMORY = ("bad_alloc", "bad allocation", "Failed to allocate", "out of memory", "Cannot allocate memory")
UNKNOWN = (
    "Unsupported model IR version",
    "under development",
    "No Op registered for",
    "is not a registered function/op",
    "Could not find an implementation for",
    "Unrecognized attribute",
    "has input size",  # more inputs than its release of an operator has
)


def package(extra: str) -> Any:
    """The module onnxruntime. Raises UnavailableError where it is missing or too old; `extra` of this project installs it."""
    try:
        onnxruntime = import_module("onnxruntime")
    except ImportError as error:
        raise UnavailableError(
            f"This backend needs onnxruntime: install the extra '{extra}' (pip install 'fusionroute[{extra}]')."
        ) from error
    release = tuple(int(part) for part in re.findall(r"\d+", onnxruntime.__version__)[:2])
    if release < OLDEST:
        raise UnavailableError(
            f"ONNX Runtime {onnxruntime.__version__} is too old: this backend needs {'.'.join(map(str, OLDEST))} or a later one; update it "
            f"(pip install --upgrade 'fusionroute[{extra}]')."
        )
    return onnxruntime


def cannot_load(name: str, graph: Path, release: str, error: Exception) -> FusionError:
    """What to raise where a session cannot be made, and what would help."""
    said = f"ONNX Runtime {release} cannot load {name} from {graph} ({one_line(error)})"
    if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
        return UnavailableError(f"{said}; free memory, or load a smaller precision.")
    if any(words in str(error) for words in UNKNOWN):
        return UnavailableError(f"{said}; update ONNX Runtime, or export the bundle with the release that reads it.")
    return BundleError(f"{said}; export the bundle again.")


OPEN: WeakSet[Any] = WeakSet()  # every session of this process


def open_session(onnxruntime: Any, content: bytes, options: Any, weights: str | None = None, **arguments: Any) -> Any:
    """An inference session of a graph's content. weights: the folder that the locations of its weights are relative to.

    Raises what ONNX Runtime raises: its errors have no public base class.
    """
    if weights is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", weights)
    session = onnxruntime.InferenceSession(content, options, **arguments)
    OPEN.add(session)
    return session


def abandon() -> None:
    """In a forked child: never destroy the sessions, which would wait for threads that only the parent has."""
    for session in list(OPEN):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=abandon)


def settings(onnxruntime: Any, threads: int) -> Any:
    """Session options: `threads` for one operator, one operator at a time."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # failures are raised; nothing is printed
    options.inter_op_num_threads = 1
    options.intra_op_num_threads = threads
    # idle thread pools must not spin: router and expert take turns, and a spinning pool takes cores from the other
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if not sums_in_32_bits():
        # x86 then takes slower, exact kernels. Always set it would take them on AMX too, which 1.32 believes to overflow
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def check(session: Any, signature: Signature, bundle: Bundle, name: str, capacity: int = 0) -> None:
    """Raise BundleError unless a graph has a signature, and its rotary tables, where it has some, that many rows.

    name: its path in the bundle.
    """
    path = bundle.folder / name
    if (wrong := signature.misfit(session)) is not None:
        raise BundleError(
            f"The graph {path} does not have the inputs and outputs that the manifest describes ({wrong}); export the bundle again."
        )
    try:
        rows = positions(bundle.read(name)) if capacity else None
    except ValueError as error:
        raise BundleError(f"{path} cannot be read ({one_line(error)}); copy or export the bundle again.") from error
    if rows is not None and rows < capacity:
        raise BundleError(f"The graph {path} is for texts of {rows} tokens and the manifest says {capacity}; export the bundle again.")


def check_model(session: Any, bundle: Bundle, number: int, name: str, lengths: Values = ORT_LENGTHS, caches: CacheValue = FLOATS) -> None:
    """`check` the graph of the manifest's model of that number; 0 is the router. lengths, caches: see `signature.of_model`."""
    manifest = bundle.manifest
    experts = 0 if number else len(manifest.experts)
    answer = "logits", manifest.vocab_size
    signature = of_model(manifest.models[number], manifest.max_seq_len, answer, experts, lengths, caches)
    check(session, signature, bundle, name, manifest.max_seq_len)
