"""The calibration table of an export: a saved one, or a new one from texts that a temporary bundle generates."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from fusionroute.calibration.table import Table
from fusionroute.fr_export.bundle.describe import describe, write_common_files
from fusionroute.fr_export.bundle.recording_variant import recording_variant
from fusionroute.fr_export.checkpoints.deltas import Delta
from fusionroute.fr_export.checkpoints.fusion_settings import FusionSettings
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.graphs.traces import Traces
from fusionroute.fr_export.precision import Scheme
from fusionroute.fr_export.precision.calibrate import cache_folder, calibrate, check
from fusionroute.fr_export.precision.int4 import LEAN, Int4
from fusionroute.fr_export.precision.row_int8 import RowInt8

SCHEME = RowInt8()
LARGE = 3_000_000_000  # parameters; larger systems generate in 4 bits, since the runtime holds all models in memory
LARGE_SCHEME = Int4(LEAN, LEAN)


def recording_scheme(parameters: int) -> Scheme:
    """The precision in which a system of so many parameters, those of one base once, generates its calibration texts."""
    return LARGE_SCHEME if parameters > LARGE else SCHEME


def calibration_table(
    system: System, deltas: Mapping[str, Delta], traces: Traces, fusion: FusionSettings, source: str, prompts: Sequence[str],
    folder: Path, stages: Stages,
) -> Table:  # fmt: skip
    """The table in the .safetensors file `source`, or a new one from texts that the system generates from the prompts.

    `deltas`: what experts add to the router, of those that share one base with it. Generating needs a bundle of its own,
    which is written below `folder` and removed at the end. It has one base too, but for experts whose matrices have become
    others: what will approximate those depends on the texts.
    Raises InputError where a saved table does not fit the system, and as `calibrate` does.
    """
    if source.endswith(".safetensors"):
        table = Table.load(Path(source))
        check(table, system, traces.of())
        return table
    recording = folder / "recording"
    exact = {name: delta for name, delta in deltas.items() if not delta.matrices}
    apart = {name: trace.parameters for name, trace in traces.of().items() if name not in exact}
    scheme = recording_scheme(sum(apart.values()))

    def bundle() -> Path:
        return write_recording_bundle(system, exact, traces, fusion, scheme, recording, stages)

    try:
        return calibrate(system, traces.of(), list(prompts), fusion, bundle, scheme.name, cache_folder(), stages, together=list(exact))
    finally:
        shutil.rmtree(recording, ignore_errors=True)


def write_recording_bundle(
    system: System, deltas: Mapping[str, Delta], traces: Traces, fusion: FusionSettings, scheme: Scheme, folder: Path, stages: Stages
) -> Path:
    """The bundle that generates calibration texts, see `recording_variant`. Returns `folder`."""
    variant = recording_variant(system, deltas, traces, scheme, folder, stages)
    write_common_files(system.router, folder)
    describe(system, fusion, traces.of(), [variant], {}, folder).write(folder)
    return folder
