"""What the backends on ONNX Runtime share: the package, sessions, and the check of graphs against the manifest."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from fusionroute.runtime.errors import BundleError, UnavailableError

if TYPE_CHECKING:
    from fusionroute.runtime.manifest import Model


def package(extra: str) -> Any:
    """The module onnxruntime. Raises UnavailableError where it is missing; `extra` of this project installs it."""
    try:
        return import_module("onnxruntime")
    except ImportError as error:
        raise UnavailableError(
            f"This backend needs onnxruntime: install the extra '{extra}' (pip install 'fusionroute[{extra}]')."
        ) from error


OPEN: WeakSet[Any] = WeakSet()  # every session of this process


def open_session(onnxruntime: Any, graph: Path | bytes, options: Any, weights: str | None = None, **arguments: Any) -> Any:
    """An inference session of a graph; of its content: with the folder that the locations of its weights are relative to.

    Raises what ONNX Runtime raises: its errors have no public base class.
    """
    if weights is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", weights)
    session = onnxruntime.InferenceSession(graph if isinstance(graph, bytes) else str(graph), options, **arguments)
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
    return options


def fits(session: Any, spec: Model, result: tuple[str, int], routed: int) -> bool:
    """Whether a graph's caches, its result (logits, and of which width) and routing scores are those of the manifest:
    buffers are bound by address.
    """
    shapes = {value.name: tuple(value.shape) for value in (*session.get_inputs(), *session.get_outputs())}
    caches = [name for name in shapes if name.startswith(("past.", "present."))]
    return (
        len(caches) == 4 * spec.layers
        and all(shapes[name][1::2] == (spec.kv_heads, spec.head_size) for name in caches)
        and shapes.get(result[0], ())[-1:] == result[1:]
        and shapes.get("routing", (0,))[-1:] == (routed,)
    )


def check(sessions: Sequence[Any], specs: Sequence[Model], paths: Sequence[Path], vocab: int) -> None:
    """Raise BundleError unless every model's graph (the router's first) fits the manifest."""
    for number, (session, spec, path) in enumerate(zip(sessions, specs, paths, strict=True)):
        if not fits(session, spec, ("logits", vocab), 0 if number else len(specs) - 1):
            raise BundleError(
                f"The graph {path} does not have the inputs and outputs that the manifest describes; export the bundle again."
            )
