"""What would fail an export later and can be known at once: asked before torch is loaded, in milliseconds."""

from collections.abc import Iterable
from pathlib import Path

from fusionroute.calibration.prompts import load_parts
from fusionroute.calibration.table import Table
from fusionroute.fr_export.bundle.staged_folder import StagedBundle
from fusionroute.runtime.tensorrt.library import capabilities, load


def refuse(out: Path, force: bool, calibration: str, experts: Iterable[str], gpus: tuple[int, ...]) -> None:
    """Raise where the place, the calibration or the engines of an export cannot be had. Changes nothing.

    `experts` are the names of the experts, `gpus` the compute capabilities that engines are built for.
    Raises InputError and FusionError as `Staging.refuse`, InputError as `load_parts` and for a broken calibration table
    or one of other models, UnavailableError where TensorRT-RTX is missing or does not build for a GPU.
    """
    StagedBundle(out, force).refuse()
    if calibration.endswith(".safetensors"):
        Table.load(Path(calibration)).check_models(["router", *experts])
    else:
        load_parts(calibration)
    if gpus:
        capabilities(load("rtx"), gpus)
