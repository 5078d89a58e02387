"""What this machine is: its installed packages, its processor, and the cores that this process may use."""

import contextlib
import os
import platform
from pathlib import Path


def installed(package: str) -> str | None:
    """The version of an installed package, or None."""
    from importlib.metadata import PackageNotFoundError, version  # here: it takes an eighth of the time of `import fusionroute`

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cores() -> int:
    """How many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    import psutil  # only where the standard library does not tell

    process = psutil.Process()
    # macOS has no affinity
    return len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else os.cpu_count() or 1


def processor() -> list[str]:
    """The processor's name and, where the system tells them, its instruction sets."""
    lines: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Hardware", "flags", "Features")):
                lines.setdefault(line.partition(":")[0], line)
    return list(lines.values()) or [platform.processor()]


def sums_in_32_bits() -> bool:
    """Whether the processor is known to sum products of 8 bits in 32 bits. x86 without VNNI adds two of them in 16 bits,
    which may overflow.
    """
    return any(feature in line.split() for line in processor() for feature in ("avx512_vnni", "avx_vnni"))


def second_level_cache() -> int:
    """Bytes of a core's second-level cache, as glibc tells them; 0 where it tells none."""
    try:
        return max(os.sysconf(191), 0)  # _SC_LEVEL2_CACHE_SIZE, which Python has no name for
    except (OSError, ValueError):
        return 0
