"""How much room a bundle needs on the disk."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fusionroute.fr_export.bundle.targets import TARGETS, named
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.precision import SCHEMES
from fusionroute.runtime.errors import FusionError
from fusionroute.runtime.tensorrt.library import TARGET as ENGINES_OF


def check_space(system: System, precisions: Sequence[str], targets: Sequence[str], engines: bool, folder: Path, out: Path) -> None:
    """Refuse before any work where the disk of `folder` cannot hold the bundle that will be `out`. Raises FusionError."""
    values = sum(int(np.prod(entry.shape)) for model in system.models for entry in model.weights.entries.values())
    bits: dict[str, float] = {}
    for target in targets:
        where = (
            "" if TARGETS[target].place is named else target
        )  # targets share the weights of one precision, but for folders that stand alone
        bits |= {f"{p} {where}": SCHEMES[target][p].bits for p in precisions if p in SCHEMES[target]}
    if engines:  # which hold the weights again
        bits |= {f"{p} engines": SCHEMES[ENGINES_OF][p].bits for p in precisions if p in SCHEMES[ENGINES_OF]}
    needed = sum(bits.values()) * values / 8
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise FusionError(
            f"The bundle needs about {needed / 1e9:.1f} GB, but {out.absolute().parent} has {free / 1e9:.1f} GB free: "
            "make room, export fewer precisions, or name another disk with --out."
        )
