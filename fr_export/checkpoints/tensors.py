"""Where one tensor of a checkpoint comes from. A new kind of source is one new class with these members."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open

ReadRows = Callable[[int, int], torch.Tensor]  # start, stop → these rows along the first axis; of a scalar: all of it


class StoredTensor(Protocol):
    """One tensor: the files it lies in, its dtype as safetensors names it, its shape, and its rows."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that the values are made of. The first is the one that messages name."""
        ...

    @property
    def dtype(self) -> str:
        """F32, F16, BF16, … as safetensors names it."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values."""
        ...

    def open(self) -> AbstractContextManager[ReadRows]:
        """A function that reads rows of any float dtype, while the files are open."""
        ...


@dataclass(frozen=True)
class SafetensorsTensor:
    """A tensor as a safetensors file holds it."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """The one file."""
        return (self.file,)

    @contextmanager
    def open(self) -> Iterator[ReadRows]:
        """See `StoredTensor.open`."""
        with safe_open(self.file, framework="pt") as handle:
            part = handle.get_slice(self.name)
            yield lambda start, stop: part[start:stop] if self.shape else handle.get_tensor(self.name)
