"""TensorRT and TensorRT-RTX, two libraries with one API, and the machine's GPU."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from typing import Any

from fusionroute.runtime.errors import InputError, UnavailableError

MODULES = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}  # flavour, and extra of the package → module
NAMES = {"tensorrt": "TensorRT", "rtx": "TensorRT-RTX"}
TARGET = "tensorrt"  # of the graphs that either library builds
OLDER = "tensorrt:10.3"  # of graphs for TensorRT before 10.15, in operators that every version has


def load(flavour: str) -> Any:
    """The module of a flavour. Raises UnavailableError where it is not installed or does not load."""
    try:
        return importlib.import_module(MODULES[flavour])
    except ImportError as error:
        missing = "is not installed" if error.name == MODULES[flavour] else f"does not load ({error})"
        raise UnavailableError(
            f"{NAMES[flavour]} {missing}: install the extra '{flavour}' (pip install 'fusionroute[{flavour}]')."
        ) from error


def installed_flavour() -> str | None:
    """The flavour whose library is installed, TensorRT before TensorRT-RTX; None without either."""
    return next((flavour for flavour, module in MODULES.items() if importlib.util.find_spec(module)), None)


def device_sm() -> int | None:
    """The compute capability of the first GPU, such as 86; None without a GPU or its driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    major, minor, device = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    for attribute, value in ((75, major), (76, minor)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
    return major.value * 10 + minor.value


def parse_sms(text: str) -> tuple[int, ...]:
    """`sm86+sm89` → (86, 89). Raises InputError for anything else."""
    sms = []
    for part in text.split("+"):
        number = part.strip().lower().removeprefix("sm")
        if not number.isdigit():
            raise InputError(f"'{part}' is no compute capability: expected such as sm86+sm89+sm120.")
        sms.append(int(number))
    return tuple(dict.fromkeys(sms))


def capabilities(library: Any, sms: tuple[int, ...]) -> list[Any]:
    """The library's constants for compute capabilities. Raises InputError for one that it does not build for."""
    known = {int(name[2:]): value for name, value in library.ComputeCapability.__members__.items() if name.startswith("SM")}
    for sm in sms:
        if sm not in known:
            raise InputError(
                f"TensorRT-RTX {library.__version__} does not build for sm{sm}: expected {', '.join(f'sm{n}' for n in known)}."
            )
    return [known[sm] for sm in sms]
