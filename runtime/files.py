"""Files that appear under their name only when they are complete."""

from pathlib import Path


def replace(path: Path, content: bytes) -> None:
    """Write a file that takes the place of an older one in one step. Raises OSError, and then leaves the older one as it was."""
    beside = path.with_name(f".{path.name}.partial")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
