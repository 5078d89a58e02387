"""How much room a bundle needs on the disk."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fusionroute.fr_export.bundle.targets import TARGETS
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.precision import Scheme
from fusionroute.runtime.errors import FusionError
from fusionroute.runtime.tensorrt.library import TARGET as TENSORRT


def check_space(system: System, plan: Sequence[tuple[str, Scheme]], engines: bool, folder: Path, out: Path) -> None:
    """Refuse before any work where the disk of `folder` cannot hold the bundle that will be `out`. Raises FusionError.

    `plan` lists the variants, a target and a scheme each; `engines` says whether engines are built too.
    """
    needed = weights_on_disk(system, plan, engines) + largest_tensor(system, plan)  # for a moment it lies twice
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise FusionError(
            f"The bundle needs about {needed / 1e9:.1f} GB, but {out.absolute().parent} has {free / 1e9:.1f} GB free: "
            "make room, export fewer precisions, or name another disk with --out."
        )


def largest_tensor(system: System, plan: Sequence[tuple[str, Scheme]]) -> int:
    """Bytes of the largest tensor in the widest precision."""
    values = max(int(np.prod(entry.shape)) for model in system.models for entry in model.weights.entries.values())
    return int(values * max(scheme.bits for _, scheme in plan) / 8)


def weights_on_disk(system: System, plan: Sequence[tuple[str, Scheme]], engines: bool) -> int:
    """Bytes of the weights in a bundle. Targets of one dialect share the weights of a precision, others do not."""
    values = sum(int(np.prod(entry.shape)) for model in system.models for entry in model.weights.entries.values())
    bits = {(TARGETS[target].dialect, scheme.name, scheme.bits): scheme.bits for target, scheme in plan}
    total = sum(bits.values())
    if engines:  # they hold the weights again
        total += sum(scheme.bits for target, scheme in plan if target == TENSORRT)
    return int(total * values / 8)
