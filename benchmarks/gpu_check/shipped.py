"""The shipped systems as bundles for the check."""

from pathlib import Path

from rich.console import Console

from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.export import Request, export
from fusionroute.fr_export.families import FAMILIES, Family
from fusionroute.runtime.tensorrt.library import TARGET

FOR = ("ort:cpu", "ort:cuda", TARGET)


def export_shipped(out: Path, console: Console) -> list[Path]:
    """Those of all families that ship one, in `out`; what is there already stays as it is."""
    return [export_family(family, out, console) for family in FAMILIES.values() if family.ships_tiny]


def export_family(family: Family, out: Path, console: Console) -> Path:
    """One family's."""
    folder, preset = out / family.name, family.preset("tiny")
    if not folder.exists():
        assert preset.router
        precisions = ("fp32", family.half, "int8", "int4")
        stages = Stages(console)
        with stages.progress:
            export(Request(family, preset.router, dict(preset.experts), precisions, FOR, folder), stages)
    return folder
