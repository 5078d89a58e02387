"""What this process has in memory, as the operating system counts it."""

from __future__ import annotations

import contextlib
import ctypes
from typing import NamedTuple


class Resident(NamedTuple):
    """Bytes of this process in memory: its own, and pages of files that are mapped."""

    anonymous: int
    mapped: int


def resident() -> Resident:
    """Now. Where the system does not tell mapped pages from others (macOS, Windows), all count as the process's own."""
    import psutil  # here: importing it takes time, and most runs need none

    memory = psutil.Process().memory_info()
    mapped = getattr(memory, "shared", 0)
    return Resident(memory.rss - mapped, mapped)


class MallocInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33 and later."""

    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = tuple((name, ctypes.c_size_t) for name in names.split())


def taken() -> int:
    """Bytes that this process has allocated, and pages of files that are mapped.

    Unlike `resident`, what was freed and is used again counts. Without glibc both are the same.
    """
    now = resident()
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError, TypeError):
        return sum(now)
    mallinfo.restype = MallocInfo
    allocated = mallinfo()
    return int(allocated.uordblks + allocated.hblkhd + now.mapped)


def release_freed() -> None:
    """Give memory that was freed before back to the system (glibc), which would count it as this process's."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
