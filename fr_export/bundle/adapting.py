"""What a bundle with one base keeps so that adapters can be added to it later, see `runtime.adapters.unadapted`."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from fusionroute.fr_export.checkpoints.deltas import Delta
from fusionroute.fr_export.checkpoints.tensors import StoredTensor
from fusionroute.fr_export.checkpoints.weights import Weights
from fusionroute.runtime.adapters.factor_layout import FactorLayout
from fusionroute.runtime.adapters.unadapted import COLUMNS, PLAN, ROWS, SCALES, TYPES, a_name, b_name
from fusionroute.runtime.tensor_file import Written, write_tensors

_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_unadapted(folder: Path, delta: Delta, base: Weights, vectors: Sequence[str]) -> Written:
    """Write the factors of the base without an adapter, in the dtypes of the router's.

    delta: what the base has more than the router. vectors: the tensors that experts have values of their own for.
    """
    factors = {
        name(tensor, number): part
        for tensor, terms in delta.terms.items()
        for number, term in enumerate(terms)
        for name, part in ((a_name, term.a), (b_name, term.b))
    }
    values = {name: base.read(name) for name in vectors}
    entries = {name: (_TYPES[_whole(part).dtype], part.shape) for name, part in factors.items()}

    def arrays() -> Iterator[np.ndarray]:
        yield from (_bits(_whole(part)) for part in factors.values())
        yield from values.values()

    scales = {tensor: [term.scale for term in terms] for tensor, terms in delta.terms.items()}
    entries |= {name: ("F32", array.shape) for name, array in values.items()}
    return write_tensors(folder, "unadapted", entries, arrays(), {SCALES: json.dumps(scales)})


def write_layout(folder: Path, layout: FactorLayout) -> Written:
    """Write how factors lie in the inputs of a graph, their types, and the scales of its weights."""
    scales = {COLUMNS + name: scale for name, scale in layout.columns.items()} | {ROWS + name: scale for name, scale in layout.rows.items()}
    arrays = {name: np.asarray(scale, np.float32) for name, scale in scales.items()}
    entries = {name: ("F32", array.shape) for name, array in arrays.items()}
    metadata = {PLAN: layout.plan.model_dump_json()} | ({TYPES: json.dumps(dict(layout.types))} if layout.types else {})
    return write_tensors(folder, "layout", entries, arrays.values(), metadata)


def _whole(part: StoredTensor) -> torch.Tensor:
    """A factor in a dtype that is kept as it is."""
    with part.open() as read:
        values = read(0, part.shape[0])
    return values if values.dtype in _TYPES else values.float()


def _bits(values: torch.Tensor) -> np.ndarray:
    """The values as numpy stores them, bfloat16 as integers."""
    bits: np.ndarray = (values.view(torch.int16) if values.dtype == torch.bfloat16 else values).contiguous().numpy()
    return bits
