"""The hashes of a bundle's files.

SHA-256 names contents, and is what hubs and `sha256sum` know. BLAKE3 is as strong, and several times as fast on processors
without instructions for SHA-256: https://github.com/BLAKE3-team/BLAKE3-specs.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from blake3 import blake3

HASHES: dict[str, Callable[[], Any]] = {"sha256": hashlib.sha256, "blake3": blake3}  # by their names in the manifest
TITLES = {"sha256": "SHA-256", "blake3": "BLAKE3"}
PIECE = 1 << 20  # bytes that are read at a time, into one buffer that stays in a core's cache


class Digest:
    """Hashes of bytes that come in pieces, and how many they are. names: which hashes, all by default."""

    def __init__(self, names: Iterable[str] = tuple(HASHES)):
        self.bytes = 0
        self._hashes = {name: HASHES[name]() for name in names}

    def update(self, piece: bytes | memoryview | mmap.mmap) -> None:
        """Add a piece. Long ones leave the interpreter to other threads."""
        self.bytes += len(piece)
        for each in self._hashes.values():
            each.update(piece)

    @property
    def hexdigests(self) -> dict[str, str]:
        """The hashes by name, in hexadecimal digits."""
        return {name: each.hexdigest() for name, each in self._hashes.items()}


def digest_of(path: Path, names: Iterable[str] = tuple(HASHES)) -> Digest:
    """Of a file. Raises OSError."""
    digest, buffer = Digest(names), memoryview(bytearray(PIECE))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest
