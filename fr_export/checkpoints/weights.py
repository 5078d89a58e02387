"""The tensors of a checkpoint, read slice by slice. Pickles are never read."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from fusionroute.fr_export.checkpoints.pickled import PICKLES, conversion
from fusionroute.fr_export.checkpoints.tensors import SafetensorsTensor, StoredTensor
from fusionroute.runtime.errors import InputError

FLOATS = {"F32", "F16", "BF16"}
SLICE = 1 << 24  # elements converted at a time: 64 MB as fp32. Gemma-2's embedding alone is 2.4 GB


class Weights:
    """Name → tensor of one folder. Opening reads the headers only; `rows` reads slices as fp32."""

    def __init__(self, folder: Path, entries: Mapping[str, StoredTensor]):
        self.folder = folder
        self.entries = dict(entries)
        self._digests: dict[tuple[str, int | None], str] = {}

    @property
    def files(self) -> set[Path]:
        """All files that the tensors lie in."""
        return {file for entry in self.entries.values() for file in entry.files}

    @classmethod
    def open(cls, folder: Path, extra: tuple[str, ...] = ()) -> "Weights":
        """Index `model.safetensors`, or the shards of `model.safetensors.index.json`, and `extra` files where present.

        Raises InputError where a file is missing, half-written, or the folder holds pickled weights only.
        """
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if single.is_file():
            files = {single}
        elif index.is_file():
            try:
                files = {folder / name for name in json.loads(index.read_text())["weight_map"].values()}
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise InputError(f"{index} is not a valid shard index; download the checkpoint again.") from error
        elif pickled := sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES):
            raise InputError(f"{folder} holds pickled weights ({pickled[0]}) only; {conversion(str(folder))}")
        else:
            raise InputError(f"{folder} holds no model.safetensors and no model.safetensors.index.json; download or write it again.")
        files |= {folder / name for name in extra if (folder / name).is_file()}
        entries: dict[str, StoredTensor] = {}
        for file in sorted(files):
            if file.parent != folder:
                raise InputError(f"{index} names the shard {file}, which lies outside its folder; shards must lie beside the index.")
            if not file.is_file():
                raise InputError(f"{folder} lacks the shard {file.name} that its index names; download the checkpoint again.")
            entries |= tensors_of(file)
        return cls(folder, entries)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as stored. Raises InputError where the checkpoint lacks it."""
        return self.entry(name).shape

    def entry(self, name: str) -> StoredTensor:
        """Where a tensor lies. Raises InputError where the checkpoint lacks it, or where it is no float tensor."""
        if name not in self.entries:
            raise InputError(
                f"{self.folder} lacks the tensor '{name}' that its config.json asks for; the checkpoint is incomplete: download or write it again."
            )
        entry = self.entries[name]
        if entry.dtype not in FLOATS:
            mend = "save the checkpoint in fp32" if entry.dtype == "F64" else "export the checkpoint before quantising it"
            raise InputError(f"Tensor '{name}' in {entry.files[0]} is {entry.dtype}; expected fp32, fp16 or bf16: {mend}.")
        return entry

    def rows(self, name: str, limit: int | None = None) -> Iterator[np.ndarray]:
        """The tensor as fp32 in slices along its first axis, at most `limit` rows. A scalar or vector is one slice.

        Raises InputError where a value is not finite: no precision computes with it.
        """
        entry = self.entry(name)
        total = entry.shape[0] if limit is None else min(limit, entry.shape[0])
        step = max(1, SLICE // max(1, int(np.prod(entry.shape[1:]))))
        with entry.open() as read:
            for start in range(0, total, step):
                yield finite(read(start, min(start + step, total)), name, entry)

    def take(self, name: str, ids: np.ndarray, limit: int | None = None) -> np.ndarray:
        """The rows `ids` [S] of a matrix, fp32 [S, columns]; no other row is read.

        Raises InputError where an id is not below the number of rows (or `limit`), or where a value is not finite.
        """
        entry = self.entry(name)
        total = entry.shape[0] if limit is None else min(limit, entry.shape[0])
        different, where = np.unique(ids, return_inverse=True)
        if len(wrong := different[(different < 0) | (different >= total)]):
            raise InputError(f"Token id {wrong[0]} is outside the vocabulary: expected 0 to {total - 1}.")
        with entry.open() as read:
            rows = [finite(read(row, row + 1), name, entry) for row in different.tolist()]
        return np.concatenate(rows)[where]

    def read(self, name: str) -> np.ndarray:
        """A whole (small) tensor as fp32."""
        return np.concatenate(list(self.rows(name)))

    def digest(self, name: str, limit: int | None = None) -> str:
        """A hash of the values as `rows` yields them, computed once. Raises InputError as `rows` does."""
        if (name, limit) not in self._digests:
            sha256 = hashlib.sha256()
            for part in self.rows(name, limit):
                sha256.update(np.ascontiguousarray(part).data)
            self._digests[name, limit] = sha256.hexdigest()
        return self._digests[name, limit]


def tensors_of(file: Path) -> dict[str, StoredTensor]:
    """Name → tensor of one safetensors file, from its header. Raises InputError for an incomplete one."""
    try:
        with safe_open(file, framework="pt") as handle:
            parts = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (safe_open is no mapping)
            return {name: SafetensorsTensor(file, name, part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    except SafetensorError as error:
        raise InputError(f"{file} is not a complete safetensors file ({error}); download or write it again.") from error


def finite(piece: torch.Tensor, name: str, entry: StoredTensor) -> np.ndarray:
    """A slice of a tensor as fp32. Raises InputError where a value is not finite."""
    values: np.ndarray = piece.to(torch.float32).numpy()
    if not np.isfinite(values).all():
        raise InputError(f"Tensor '{name}' in {entry.files[0]} holds values that are not finite; train or download it again.")
    return values
