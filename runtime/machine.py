"""What is here: packages in which release, and the processor."""

import contextlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def installed(package: str) -> str | None:
    """The version of a package, if it is there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor() -> list[str]:
    """The processor's name and its instruction sets, where the system tells them."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Hardware", "flags", "Features")):
                found.setdefault(line.partition(":")[0], line)
    return list(found.values())
