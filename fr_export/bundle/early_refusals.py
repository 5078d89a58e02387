"""What would fail an export later and can be known at once: asked before torch is loaded, in milliseconds."""

from collections.abc import Iterable
from pathlib import Path

from fusionroute.calibration.prompts import load_parts
from fusionroute.calibration.table import Table
from fusionroute.fr_export.bundle.staged_folder import StagedBundle
from fusionroute.runtime.errors import InputError
from fusionroute.runtime.kv_precisions import KV_PRECISIONS, KvName
from fusionroute.runtime.precisions import PRECISIONS
from fusionroute.runtime.tensorrt.library import capabilities, load


def refuse(
    out: Path, force: bool, calibration: str, experts: Iterable[str], gpus: tuple[int, ...], precisions: Iterable[str],
    kv: KvName | None = None,
) -> None:  # fmt: skip
    """Raise where the place, the calibration or the engines of an export cannot be had. Changes nothing.

    `experts` are the names of the experts, `gpus` the compute capabilities that engines are built for, `precisions` theirs,
    `kv` the precision of keys and values.
    Raises InputError and FusionError as `Staging.refuse`, InputError as `load_parts` and for a broken calibration table
    or one of other models, UnavailableError where TensorRT-RTX is missing or does not build for a GPU.
    """
    StagedBundle(out, force).refuse()
    if calibration.endswith(".safetensors"):
        table = Table.load(Path(calibration))
        table.check_models(["router", *experts])
        if kv is not None and KV_PRECISIONS[kv].quantised and not table.knows_caches:
            raise InputError(
                f"The calibration table {calibration} is of a version that did not look at keys and values: calibrate again, or leave out "
                f"--kv {kv}."
            )
    else:
        load_parts(calibration)
    if gpus:
        capabilities(load("rtx"), gpus)
        for precision in precisions:
            if min(gpus) < (least := PRECISIONS[precision].least_sm):
                raise InputError(
                    f"GPUs of sm{min(gpus)} have no {precision}, which begins with sm{least}: build engines for others, or another precision."
                )
