"""The tensors of a GGUF file under the names and in the layout of Hugging Face, dequantised row by row.

What llama.cpp's converter changes is undone: https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusionroute.fr_export.checkpoints.sources.gguf_file import GgufFile, GgufPart, library
from fusionroute.fr_export.checkpoints.stored_blocks import BlockLayout, Blocks, ReadBlocks
from fusionroute.fr_export.checkpoints.tensors import ReadRows
from fusionroute.runtime.errors import InputError

PLAIN = {"F32", "F16", "BF16"}
INTERLEAVED = {"llama", "smollm3"}  # rotary pairs lie side by side in rows of queries and keys, not in two halves
IN_BLOCKS = {"Q4_0": 4, "Q8_0": 8}  # bits of types whose values are integer · scale
SHIFTED_NORMS = {"gemma", "gemma2", "gemma3"}  # norms hold 1 + w


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file. Rows are read from the mapped file and dequantised by the package gguf.

    `heads`: the number of heads whose rows are interleaved, 0 where rows stand in order. `shift` is added to all values.
    """

    part: GgufPart
    heads: int = 0
    shift: float = 0.0

    @property
    def files(self) -> tuple[Path, ...]:
        """The file that it lies in."""
        return (self.part.file,)

    @property
    def dtype(self) -> str:
        """F16 or BF16 where the file has it so, else F32: what dequantising gives."""
        return self.part.type_name if self.part.type_name in PLAIN and not self.shift else "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values."""
        return self.part.shape

    @contextmanager
    def open(self) -> Iterator[ReadRows]:
        """See `StoredTensor.open`. A vector's rows are its values."""
        gguf = library()
        kind = gguf.GGMLQuantizationType(self.part.type)
        stored = rows_of(self.part)

        def read(start: int, stop: int) -> torch.Tensor:
            data = stored[self.order(start, stop)] if self.heads else stored[start:stop]
            values = np.asarray(gguf.dequantize(np.ascontiguousarray(data), kind), np.float32)
            values = values.reshape(len(data), *self.shape[1:]) + np.float32(self.shift)  # a copy: the mapped file stays as it is
            return torch.from_numpy(values)

        yield read

    @property
    def layout(self) -> BlockLayout | None:
        """See `BlockStored.layout`: of the types whose blocks are a scale and as many integers."""
        bits = IN_BLOCKS.get(self.part.type_name)
        return BlockLayout(bits, block_of(self.part.type)[0], np.dtype(np.float16), False) if bits else None

    @contextmanager
    def open_blocks(self) -> Iterator[ReadBlocks]:
        """See `BlockStored.open_blocks`. A block is an fp16 scale, then 32 values: bytes, or low halves before high ones."""
        stored = rows_of(self.part)

        def read(start: int, stop: int) -> Blocks:
            data = stored[self.order(start, stop)] if self.heads else stored[start:stop]
            blocks = data.reshape(len(data), -1, block_of(self.part.type)[1])
            scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
            values = blocks[..., 2:]
            if IN_BLOCKS[self.part.type_name] == 4:
                return Blocks(np.concatenate([values & 15, values >> 4], axis=-1), scales, None)
            return Blocks(values ^ np.uint8(128), scales, None)

        yield read

    def order(self, start: int, stop: int) -> np.ndarray:
        """Where the rows from `start` to `stop` of the Hugging Face layout lie in the file."""
        head = self.shape[0] // self.heads  # rows of a head: first halves of the pairs, then the second ones
        row = np.arange(start, stop)
        within = row % head
        return row - within + within % (head // 2) * 2 + within // (head // 2)


def rows_of(part: GgufPart) -> np.ndarray:
    """The bytes uint8 [rows, bytes of a row] of a tensor, mapped; of a vector each value is a row."""
    block, size = block_of(part.type)
    width = int(np.prod(part.shape[1:])) // block * size
    return np.memmap(part.file, np.uint8, "r", part.start, (part.shape[0], width)).view(np.ndarray)


def block_of(kind: int) -> tuple[int, int]:
    """The values and the bytes of a block of a ggml type."""
    gguf = library()
    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    return int(values), int(size)


def tensors(where: str, gguf_file: GgufFile, names: Iterable[str], config: Any) -> dict[str, GgufTensor]:
    """The tensors `names` of a model, as Hugging Face names them; those that the file lacks are left out.

    Raises InputError for an architecture or a ggml type that the package gguf cannot read.
    """
    gguf = library()
    architecture = next((arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == gguf_file.architecture), None)
    if architecture is None:
        raise InputError(
            f"{where} is of the GGUF architecture '{gguf_file.architecture}', which this release of the package gguf does not know: "
            "upgrade it (pip install -U gguf)."
        )
    mapped = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    entries = {}
    for name in names:
        stem, _, suffix = name.rpartition(".")
        stored = f"{mapped.get_name(stem)}.{suffix}"
        if (part := gguf_file.parts.get(stored)) is None:
            continue
        check_type(where, part)
        interleaved = heads.get(stored.split(".")[-2], 0) if gguf_file.architecture in INTERLEAVED else 0
        shifted = gguf_file.architecture in SHIFTED_NORMS and stored.endswith("norm.weight")
        entries[name] = GgufTensor(part, interleaved, -1.0 if shifted else 0.0)
    return entries


def check_type(where: str, part: GgufPart) -> None:
    """Raises InputError for a ggml type that cannot be dequantised."""
    gguf = library()
    try:
        gguf.dequantize(np.zeros((1, block_of(part.type)[1]), np.uint8), gguf.GGMLQuantizationType(part.type))
    except NotImplementedError as error:
        raise InputError(
            f"{where} holds tensors of the type {part.type_name}, which the package gguf cannot dequantise: use a GGUF of the model "
            "in F16, Q8_0 or a K-quant such as Q4_K_M."
        ) from error
