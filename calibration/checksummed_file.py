"""Safetensors files of a kind, with a digest in the header that covers everything they hold."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fusionroute.runtime.errors import InputError, one_line
from fusionroute.runtime.files import replacing

FORMAT = "1"  # of all kinds
CHECKSUM = "sha256"  # its name in the header


def write(path: Path, kind: str, tensors: Mapping[str, np.ndarray], about: Mapping[str, str]) -> None:
    """Write arrays and the texts `about` them, in one step.

    Raises InputError where that fails; an older file is then unchanged.
    """
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    header = {**about, "kind": kind, "format": FORMAT}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            save_file(contiguous, beside, header | {CHECKSUM: checksum(contiguous, header)})
    except (OSError, SafetensorError) as error:
        raise InputError(f"The {kind} cannot be written to {path} ({one_line(error)}); choose a folder with room.") from error


def read(path: Path, kind: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays and texts that were written.

    Raises InputError for a file that is missing, changed, or of another kind or format.
    """
    try:
        with safe_open(path, framework="np") as file:
            header = file.metadata() or {}
            if header.get("kind") != kind:
                raise InputError(f"{path} is no {kind}: name a file that was written as one.")
            if header.get("format") != FORMAT:
                raise InputError(f"{path} is a {kind} of format {header.get('format')}, this version reads {FORMAT}: make it again.")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except (OSError, SafetensorError) as error:
        raise InputError(f"The {kind} {path} cannot be read ({one_line(error)}); make it again.") from error
    if header.pop(CHECKSUM, None) != checksum(tensors, header):
        raise InputError(f"The {kind} {path} was changed after it was written (its SHA-256 differs): make it again.")
    return tensors, {name: text for name, text in header.items() if name not in ("kind", "format")}


def checksum(tensors: Mapping[str, np.ndarray], header: Mapping[str, str]) -> str:
    """SHA-256 over names, types, shapes and bytes, and over the header."""
    digest = hashlib.sha256(repr(sorted(header.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(repr((name, tensor.dtype.str, tensor.shape)).encode())
        digest.update(hashlib.sha256(tensor.tobytes()).digest())
    return digest.hexdigest()
