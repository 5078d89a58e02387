"""How much room a bundle needs on the disk."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fusionroute.fr_export.bundle.targets import TARGETS
from fusionroute.fr_export.checkpoints.deltas import Delta
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.checkpoints.tensors import StoredTensor
from fusionroute.fr_export.precision import Scheme
from fusionroute.fr_export.precision.rank_budget import RankBudget
from fusionroute.fr_export.precision.scheme import Fitting
from fusionroute.runtime.backends.ort_cpu import TARGET as CPU
from fusionroute.runtime.errors import FusionError
from fusionroute.runtime.tables import size
from fusionroute.runtime.tensorrt.library import TARGET as TENSORRT

SAMPLED, SAMPLES = 1 << 16, 8  # tensors from this number of values on are compared, by so many rows


def check_space(needed: int, free: int, out: Path) -> None:
    """Refuse before any work where the disk of the bundle that will be `out` cannot hold it. Raises FusionError."""
    if needed > free:
        raise FusionError(
            f"The bundle needs about {size(needed)}, but {out.absolute().parent} has {size(free)} free: "
            "make room, export fewer precisions, or name another disk with --out."
        )


def free_space(out: Path) -> int:
    """Bytes free where `out` is or will be."""
    folder = out.absolute()
    return shutil.disk_usage(next(each for each in (folder, *folder.parents) if each.exists())).free


class Stored(NamedTuple):
    """How many values a bundle stores of a system: of weights, in each precision, and of experts' factors."""

    values: int
    factors: int


def stored(system: System, deltas: Mapping[str, Delta] | None = None, budget: RankBudget | None = None) -> Stored:
    """What a bundle stores; with `deltas`, the router, experts without a delta, and the factors of the others, without their
    padding, where some approximate what the expert changes (`budget`).
    """
    if deltas is None:
        return Stored(stored_values(system), 0)
    shapes = {name: entry.shape for name, entry in system.router.weights.entries.items()}
    weights = sum(int(np.prod(shape)) for shape in shapes.values() if len(shape) == 2)
    factors = sum(delta.values for delta in deltas.values())
    for delta in deltas.values():
        if delta.matrices and budget is not None:
            factors += budget.values(weights, sum(sum(shapes[name]) for name in delta.matrices))
    whole = [model for model in system.models if model.name not in deltas]
    return Stored(sum(int(np.prod(entry.shape)) for model in whole for entry in model.weights.entries.values()), factors)


def factor_width(target: str, scheme: Scheme) -> int:
    """Bytes of a factor's value in a variant: half precision where graphs compute in it."""
    return 4 if target == CPU or scheme.name == "fp32" else 2


def factors_on_disk(values: int, plan: Sequence[tuple[str, Scheme]]) -> int:
    """Bytes of factors of so many values in a bundle: precisions whose graphs take them alike share them."""
    widths = {(TARGETS[target].pair, width): width for target, scheme in plan for width in [factor_width(target, scheme)]}
    return values * sum(widths.values())


def stored_values(system: System) -> int:
    """Values that a bundle stores once per precision: equal tensors of several models stand once.

    Tensors of one shape count as equal where `SAMPLES` rows are, since reading all of them would take minutes.
    """
    seen: set[tuple[tuple[int, ...], bytes]] = set()
    total = 0
    for entry in (entry for model in system.models for entry in model.weights.entries.values()):
        values = int(np.prod(entry.shape))
        if values >= SAMPLED:
            key = entry.shape, sample(entry)
            if key in seen:
                continue
            seen.add(key)
        total += values
    return total


def sample(entry: StoredTensor) -> bytes:
    """Some rows of a tensor, evenly spaced, as bytes of fp32."""
    with entry.open() as read:
        places = np.linspace(0, entry.shape[0] - 1, min(SAMPLES, entry.shape[0])).astype(int)
        return b"".join(read(int(place), int(place) + 1).float().numpy().tobytes() for place in places)


def bits_on_disk(scheme: Scheme, calibrated: bool) -> float:
    """Bits per weight, scales included. Calibration may spend more on sensitive matrices (`most_bits`)."""
    if calibrated and isinstance(scheme, Fitting):
        return max(scheme.bits, getattr(scheme, "most_bits", scheme.bits))
    return scheme.bits


def largest_tensor(system: System, plan: Sequence[tuple[str, Scheme]]) -> int:
    """Bytes of the largest tensor in the widest precision."""
    values = max(int(np.prod(entry.shape)) for model in system.models for entry in model.weights.entries.values())
    return int(values * max(scheme.bits for _, scheme in plan) / 8)


def weights_on_disk(values: int, plan: Sequence[tuple[str, Scheme]], calibrated: bool, engines: bool) -> int:
    """Bytes of the weights in a bundle of `values`. Targets of one dialect share the weights of a precision, others do not.

    `plan` lists the variants, a target and a scheme each; `engines` says whether engines are built too, which hold the
    weights again.
    """
    sizes = [(target, scheme, bits_on_disk(scheme, calibrated)) for target, scheme in plan]
    stored = {(TARGETS[target].dialect, scheme.name, bits): bits for target, scheme, bits in sizes}
    built = sum(bits for target, _, bits in sizes if target == TENSORRT) if engines else 0.0
    return int((sum(stored.values()) + built) * values / 8)
