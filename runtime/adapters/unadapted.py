"""What a bundle with one base keeps so that adapters can be added to it: the factors of an expert without an adapter, and
how factors lie in each graph.

The base in the graph is the router as it is. So the base without any adapter is an expert too: its factors are the
router's with the sign turned. An adapter adds its own to them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from pydantic import TypeAdapter, ValidationError

from fusionroute.runtime.adapters.factor_layout import Factor, FactorLayout, Factors, Plan, rank_of
from fusionroute.runtime.adapters.lora_adapter import LoraAdapter, finite
from fusionroute.runtime.errors import BundleError, InputError, one_line
from fusionroute.runtime.tensor_file import WIDTHS, Stored, TensorFile, narrowed, widened

PLAN, SCALES, TYPES = "plan", "scales", "types"  # metadata
COLUMNS, ROWS = "columns:", "rows:"  # in front of what the scales in a layout's file belong to
_SCALES = TypeAdapter(dict[str, list[float]])
_TYPES = TypeAdapter(dict[str, Literal["F16", "BF16"]])


@dataclass(frozen=True)
class Unadapted:
    """An expert that is the base itself. `vectors`: the base's values of the tensors that experts have their own of."""

    factors: Factors
    vectors: Mapping[str, np.ndarray]

    @classmethod
    def read(cls, source: Path | BinaryIO) -> "Unadapted":
        """Raises BundleError for a file that does not hold it."""
        try:
            file = TensorFile(source)
            scales = _SCALES.validate_json(file.metadata.get(SCALES, "{}"))
            factors = {
                tensor: [
                    _stored_factor(file.tensors[a_name(tensor, n)], file.tensors[b_name(tensor, n)], scale) for n, scale in enumerate(own)
                ]
                for tensor, own in scales.items()
            }
            taken = {name(tensor, n) for tensor, own in scales.items() for n in range(len(own)) for name in (a_name, b_name)}
            return cls(factors, {name: tensor.values() for name, tensor in file.tensors.items() if name not in taken})
        except (OSError, ValueError, KeyError) as error:
            raise _broken(source, error) from error


def a_name(tensor: str, number: int) -> str:
    """How the file calls the a of a tensor's factors."""
    return f"{tensor}:{number}.a"


def b_name(tensor: str, number: int) -> str:
    """How the file calls the b of a tensor's factors."""
    return f"{tensor}:{number}.b"


def read_layout(source: Path | BinaryIO) -> FactorLayout:
    """How factors lie in a graph. Raises BundleError for a file that does not say it."""
    try:
        file = TensorFile(source)
        plan = Plan.model_validate_json(file.metadata[PLAN])
        columns, rows = (
            {name.removeprefix(kind): tensor.values() for name, tensor in file.tensors.items() if name.startswith(kind)}
            for kind in (COLUMNS, ROWS)
        )
        return FactorLayout(plan, columns, rows, _TYPES.validate_json(file.metadata.get(TYPES, "{}")))
    except (OSError, ValueError, KeyError, ValidationError) as error:
        raise _broken(source, error) from error


class AdapterFactors:
    """The inputs of an expert that an adapter makes of the base: their `shapes` by name, and in this order `arrays`."""

    def __init__(self, layout: FactorLayout, unadapted: Unadapted, adapter: LoraAdapter):
        """Raises InputError for an adapter of what the graph has no inputs for, or of another shape."""
        self._layout, self._unadapted, self._adapter = layout, unadapted, adapter
        widths = {name: (rows, group.width) for group in layout.plan.groups for matrix in group.matrices for name, rows in matrix.tensors}
        vectors = {name: (size,) for vector in layout.plan.vectors for name, size in vector.tensors}
        expected: dict[str, tuple[int, ...]] = {**widths, **vectors}
        given = {**adapter.shapes, **{name: tensor.shape for name, tensor in adapter.whole.items()}}
        for name, shape in given.items():
            if (name in adapter.factors and name not in widths) or (name in adapter.whole and name not in vectors):
                raise InputError(
                    f"{adapter.where} changes '{name}', which no expert did when the bundle was exported, so that its graph has no input "
                    "for it: train an adapter of the others' modules, or export the bundle again with this one."
                )
            if shape != expected[name]:
                raise InputError(
                    f"{adapter.where} changes '{name}' in shape {list(shape)}, and the bundle's base has {list(expected[name])}: "
                    "name an adapter of that base."
                )
        self._factors: dict[str, Sequence[Factor]] = {
            name: [*([adapter.factors[name]] if name in adapter.factors else []), *unadapted.factors.get(name, ())] for name in widths
        }
        for group in layout.plan.groups:
            for matrix in group.matrices:
                rank = rank_of(matrix, self._factors, {})
                if group.rank is not None and rank > group.rank:
                    raise InputError(
                        f"{adapter.where} and the router's own adapter have rank {rank} together in '{matrix.tensors[0][0]}', and the graph "
                        f"takes {group.rank}: train an adapter of a lower rank, or export the bundle again with this one."
                    )
        self.shapes = layout.shapes(self._factors)

    @property
    def entries(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name → type as safetensors names it, and shape."""
        return {name: (self._layout.types.get(name, "F32"), shape) for name, shape in self.shapes.items()}

    @property
    def bytes(self) -> int:
        """Of all arrays."""
        return sum(WIDTHS[dtype] * prod(shape) for dtype, shape in self.entries.values())

    def arrays(self) -> Iterator[np.ndarray]:
        """Each in its type, of BF16 the bits. Raises InputError where a value is not finite in it."""
        wide = self._layout.arrays(self._factors, self._vector)
        for (name, (dtype, _)), values in zip(self.entries.items(), wide, strict=True):
            array = narrowed(values, dtype)
            if dtype != "F32" and not np.isfinite(widened(array, dtype)).all():
                raise InputError(
                    f"{self._adapter.where} has values in '{name}' beyond the range of {dtype}, in which the bundle's graph computes: "
                    "export another precision."
                )
            yield array

    def _vector(self, tensor: str) -> np.ndarray:
        own = self._adapter.whole.get(tensor)
        return self._unadapted.vectors[tensor] if own is None else finite(own.values(), f"'{tensor}' of {self._adapter.where}")


def _stored_factor(a: Stored, b: Stored, scale: float) -> Factor:
    return Factor(a.shape[0], lambda: (a.values(), b.values() * np.float32(scale)))


def _broken(source: Path | BinaryIO, error: Exception) -> BundleError:
    where = source if isinstance(source, Path) else source.name
    return BundleError(f"{where} does not hold what an expert without an adapter is ({one_line(error)}); export the bundle again.")
