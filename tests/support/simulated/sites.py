"""Sites: where in the runtime a call of the device is made.

They name buffers, and the mutations that leave a wait out.
"""

from __future__ import annotations

import linecache
import sys
from types import FrameType

from tests.support.paths import REPOSITORY

ROOT = f"{REPOSITORY}/"
RUNTIME = "runtime/tensorrt/"
LAYER = "runtime/tensorrt/device.py"  # the thin layer, which makes the calls of others


def site() -> str:
    """The line of the runtime that makes a call, and the chain of functions that leads to it, the innermost first."""
    frames = chain()
    return f"`{frames[0][1]}` in {' < '.join(name for name, _ in frames)}" if frames else "the test"


def chain() -> list[tuple[str, str]]:
    """The innermost frames of `runtime/tensorrt` above the thin layer: each function's name and current line."""
    frames: list[tuple[str, str]] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename.removeprefix(ROOT)
        if name.startswith(RUNTIME) and name != LAYER:
            if not frame.f_code.co_name.startswith("<"):
                owner = frame.f_locals.get("self")
                function = f"{type(owner).__name__}.{frame.f_code.co_name}" if owner is not None else frame.f_code.co_name
                frames.append((function, linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()))
                if frame.f_code.co_name == "__del__":  # the collector may call it from anywhere
                    break
        elif frames:
            break
        frame = frame.f_back
    return frames
