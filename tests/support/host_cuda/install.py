"""Compile CUDA on the host, and give its functions to NVIDIA's binding. For a process that does nothing else."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

SOURCES = sorted(Path(__file__).parent.glob("*.c"))
NAME = "libcuda.so.1"  # what the runtime opens to ask for the GPU: the library that is loaded under this name


def compiler() -> str | None:
    """A C compiler; None without one."""
    return next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)


def compile_library(folder: Path) -> Path:
    """The library, in a folder. Raises CalledProcessError where it does not compile."""
    library, program = folder / NAME, compiler()
    assert program is not None
    options = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread", f"-Wl,-soname,{NAME}"]
    subprocess.run([program, *options, "-o", library, *SOURCES], check=True)
    return library


def install(path: Path) -> ctypes.CDLL:
    """Put a compiled library in the place of CUDA in this process, before anything has imported the binding's runtime.

    Returns the library, whose `host_cuda_faults` says what went wrong without a status.
    """
    assert "cuda.bindings.cyruntime" not in sys.modules, "the binding has taken NVIDIA's functions already"
    library = ctypes.CDLL(str(path))
    library.host_cuda_faults.restype = ctypes.c_char_p
    table = import_module("cuda.bindings._internal.runtime").__pyx_capi__
    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype, api.PyCapsule_GetName.argtypes = ctypes.c_void_p, [ctypes.py_object]
    api.PyCapsule_New.restype, api.PyCapsule_New.argtypes = ctypes.py_object, [ctypes.c_void_p] * 3
    for name, theirs in table.items():
        ours = getattr(library, name.removeprefix("_"), None)
        if ours is not None:  # the signature is the capsule's name, a constant of the module
            table[name] = api.PyCapsule_New(ctypes.cast(ours, ctypes.c_void_p), api.PyCapsule_GetName(theirs), None)
    return library


def faults(library: ctypes.CDLL) -> list[str]:
    """What the program did since the last call that works on a real device only by luck."""
    text: str = library.host_cuda_faults().decode()
    library.host_cuda_forget()
    return text.splitlines()
